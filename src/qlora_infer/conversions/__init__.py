"""Adapters whose files are written as PEFT's LoRA, exactly and without the base model; one format a file."""
