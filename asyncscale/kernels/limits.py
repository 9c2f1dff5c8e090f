"""What this machine does at most: the measure of what the decoder's kernels reach."""

from __future__ import annotations

import mmap
import time
from collections.abc import Collection
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asyncscale.kernels.library import FORMATS, Format, Library

PLAIN_FORMATS: tuple[Format, ...] = ("bfloat16", "float32", "int8")

_TIMES = 20
_LEAST_BYTES = 256 << 20
_CACHES = 4  # how many times the largest cache is read
_NUM_ROUNDS = 5000  # sums of 8-bit products must not overflow
_MULTIPLY_S = 0.03


@dataclass(frozen=True, slots=True)
class Limits:
    """With so many threads, the best of several runs.

    bytes_per_s: read from memory.
    operations_per_s: of numbers of each format; a multiplication and an addition are two.
    """

    num_threads: int
    bytes_per_s: float
    operations_per_s: dict[Format, float]


def measure_limits(
    library: Library,
    num_threads: int,
    formats: Collection[Format] = PLAIN_FORMATS,
    *,
    scale: float = 1.0,
) -> Limits:
    """Measure; takes about two seconds and 256 MiB of memory, or a part of both: scale."""
    library.cdll.asyncscale_read.argtypes = (c_void_p, c_int64, c_void_p)
    library.cdll.asyncscale_read.restype = None
    library.cdll.asyncscale_multiply.argtypes = (c_int64, c_int64, c_int64, c_void_p)
    library.cdll.asyncscale_multiply.restype = c_int64
    team = library.cdll.asyncscale_team_new(num_threads)
    try:
        return Limits(
            library.cdll.asyncscale_team_size(team),
            _bytes_per_s(library, team, scale),
            {name: _operations_per_s(library, team, name, scale) for name in sorted(formats)},
        )
    finally:
        library.cdll.asyncscale_team_delete(team)


def best_limits(first: Limits, second: Limits) -> Limits:
    """Of two measurements of the same."""
    return Limits(
        first.num_threads,
        max(first.bytes_per_s, second.bytes_per_s),
        {name: max(limit, second.operations_per_s[name]) for name, limit in first.operations_per_s.items()},
    )


def _bytes_per_s(library: Library, team: int, scale: float) -> float:
    size = max(int(scale * max(_LEAST_BYTES, _CACHES * _largest_cache())), 1 << 20)
    data = _memory(size)
    best = 0.0
    for _ in range(_TIMES):
        began = time.perf_counter()
        library.cdll.asyncscale_read(data.ctypes.data, size, team)
        best = max(best, size / (time.perf_counter() - began))
    return best


def _operations_per_s(library: Library, team: int, name: Format, scale: float) -> float:
    best, num_times = 0.0, 1
    for _ in range(_TIMES):
        began = time.perf_counter()
        num_operations = library.cdll.asyncscale_multiply(FORMATS[name], num_times, _NUM_ROUNDS, team)
        duration = time.perf_counter() - began
        best = max(best, num_operations / duration)
        num_times = max(1, int(num_times * scale * _MULTIPLY_S / duration))
    return best


def _memory(size: int) -> npt.NDArray[np.uint8]:
    """Committed, in large pages where there are any: no page of zeros that all addresses share."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(memory, np.uint8)
    data.fill(1)
    return data


def _largest_cache() -> int:
    """In bytes; 0 where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size[:-1].isdigit() and size.endswith("K")), default=0)
