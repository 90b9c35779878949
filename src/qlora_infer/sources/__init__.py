"""The places that adapters come from: the Hub, a folder, a URL, a trainer's memory, a blend of others."""
