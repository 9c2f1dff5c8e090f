"""Decides which tokens to compute and keeps their state. `process` is the entry point of an engine process."""
