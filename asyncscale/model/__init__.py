"""Models: the runners that turn a batch into tokens."""
