"""Chat templates of adapters, which are not trusted."""
