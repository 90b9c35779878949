"""Parts of adapters that are LoRA only together with the base model, converted exactly, one kind a file."""
