"""Adapters in other forms, converted exactly to PEFT's LoRA form, one form a file."""
