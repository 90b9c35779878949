"""One strategy a file; the file's name is the strategy's. ``quantization/__init__.py`` imports each of them."""
