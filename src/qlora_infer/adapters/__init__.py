"""From a source to an adapter that vLLM serves: where it comes from, what it says, whether it fits, what is loaded."""
