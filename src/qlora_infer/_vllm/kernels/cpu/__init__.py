"""LoRA, and what vLLM lacks or gets wrong, on the CPU."""
