"""The program ``qlora-infer serve``: vLLM's OpenAI server on this engine, with keys, limits and routes for adapters."""
