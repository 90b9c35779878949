"""The transfer of an adapter from its file to a slot."""
