"""Processes for untrusted input: they end in time, take little memory, and get nothing of the environment."""
