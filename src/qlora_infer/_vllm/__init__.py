"""The only door to vLLM: its engine, its workers and our kernels in them. Nothing else here imports vLLM."""
