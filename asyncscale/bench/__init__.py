"""Benchmarks: `python -m asyncscale.bench`."""
