"""The kinds of things that people name as adapters, and how an adapter was trained."""
