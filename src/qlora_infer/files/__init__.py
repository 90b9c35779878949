"""An adapter's files: a private copy of them, and their content, read without torch and without trust."""
