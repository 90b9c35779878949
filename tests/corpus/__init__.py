"""Small adapters, one for each kind that people have, with the verdict on each: ``corpus.all_entries.CORPUS``."""
