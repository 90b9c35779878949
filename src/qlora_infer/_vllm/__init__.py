"""The only folder that imports vLLM: its engine, its workers, and our kernels in them."""
