"""vLLM's OpenAI server on an engine of this library; docs/internals/serve.md has what is touched of it."""
