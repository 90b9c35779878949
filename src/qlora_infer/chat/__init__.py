"""Conversations written as prompts, with chat templates that nobody trusts."""
