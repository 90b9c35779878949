"""Processes for what strangers wrote: they end in time, take little memory, and get nothing of the environment."""
