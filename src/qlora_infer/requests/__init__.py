"""A request's way to its outputs: the client, the queue, and the thread that drives the engine."""
