"""The base model's config and the modules that adapters may change, read from its checkpoint."""
