"""The life of a loaded adapter: its preparation, checks, versions, memory and effect."""
