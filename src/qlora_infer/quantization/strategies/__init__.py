"""The strategies, one a file of the same name."""
