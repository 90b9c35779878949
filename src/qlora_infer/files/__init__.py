"""An adapter's files, copied, and read without torch and without trust."""
