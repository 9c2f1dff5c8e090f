"""How large the cache of packed weights may become: what was used least recently goes first, never what is in use."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

from asyncscale.errors import ModelLoadError
from asyncscale.model.file_lock import remove_unless_used

LIMIT_VARIABLE = "ASYNCSCALE_WEIGHT_CACHE_GIB"
_DEFAULT_GIB = 20.0


class DoesNotFitError(Exception):
    """One file alone is larger than the cache may be."""


def make_room(folder: Path, num_bytes: int) -> None:
    """Removes files so that `num_bytes` more fit; and whatever a killed process did not finish.

    Files in use stay, even if that exceeds the limit. Raises DoesNotFitError where nothing can make it fit.
    """
    limit = _limit_bytes()
    if num_bytes > limit:
        raise DoesNotFitError(f"{num_bytes / 2**30:.1f} GiB exceed the limit that {LIMIT_VARIABLE} sets")
    for leftover in folder.glob("*.building"):
        remove_unless_used(leftover)
    entries = []
    for path in folder.glob("*.weights"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            entries.append((stat.st_mtime_ns, stat.st_size, path))
    excess = sum(size for _, size, _ in entries) + num_bytes - limit
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        if remove_unless_used(path):
            excess -= size


def _limit_bytes() -> float:
    stated = os.environ.get(LIMIT_VARIABLE, "")
    try:
        gib = float(stated) if stated else _DEFAULT_GIB
    except ValueError:
        gib = math.nan
    if not gib >= 0:
        raise ModelLoadError(f"{LIMIT_VARIABLE} must be a number of GiB, got {stated!r}")
    return gib * 2**30
