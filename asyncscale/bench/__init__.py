"""Benchmarks: `python -m asyncscale.bench COMMAND`."""
