"""Tiny random models of many architectures, adapters that PEFT made for them, and what transformers + PEFT answer."""
