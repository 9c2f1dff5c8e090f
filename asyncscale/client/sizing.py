"""How many engines `num_engines="auto"` means."""

from __future__ import annotations

from asyncscale.cpus import UsableCpus

# More copies of the weights than this only pay where memory bandwidth is ample: ask for them by number.
_MAX_AUTO_ENGINES = 4


def auto_num_engines(cpus: UsableCpus) -> int:
    """One engine per usable core, at most four.

    Small models gain more from a second engine than from a second thread.
    """
    return min(cpus.num_cores, _MAX_AUTO_ENGINES)
