"""vLLM's OpenAI server on an engine of this library; docs/internals/serve.md lists its parts in use."""
