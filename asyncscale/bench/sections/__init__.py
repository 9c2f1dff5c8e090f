"""The parts of `python -m asyncscale.bench scale`: each module's `measure` returns rows of the table."""
