"""How many engines `num_engines="auto"` means."""

from __future__ import annotations

import os

# More copies of the weights than this only pay where memory bandwidth is ample: ask for them by number.
_MAX_AUTO_ENGINES = 4


def usable_cpus() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def auto_num_engines() -> int:
    """One engine per usable core, at most four.

    Small models gain more from a second engine than from a second thread.
    """
    return min(usable_cpus(), _MAX_AUTO_ENGINES)
