"""How many threads an engine computes with."""

from __future__ import annotations

import os

from asyncscale.config import EngineSpec


def num_threads(spec: EngineSpec) -> int:
    """What the configuration says, else the usable CPUs divided over the engines."""
    if spec.config.threads_per_engine is not None:
        return spec.config.threads_per_engine
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(usable // spec.num_engines, 1)
