"""LoRA on a GPU: both products in one launch."""
