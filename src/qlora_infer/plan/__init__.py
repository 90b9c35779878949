"""Decisions before vLLM starts: slots, host memory, CUDA graphs, kernels, and the arguments that follow."""
