"""The base model: which of its modules adapters may change, read from its checkpoint without loading it."""
