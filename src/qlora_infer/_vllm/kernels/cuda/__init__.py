"""Kernels for a GPU, which compute both LoRA products in one launch."""
