"""Read adapters from the Hub, a folder, a URL, a trainer's memory, or a blend of others."""
