"""Random numbers that are a pure function of (seed, position): no state to keep, move or replay.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, with
the finalizer "Mix13" of David Stafford's "Better Bit Mixing", 2011): its output number `position`, computed directly,
of the stream that starts at the mixed seed. The seed is mixed first so that neighbouring seeds start unrelated streams.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]
Float64 = npt.NDArray[np.float64]

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd


def uniforms(seeds: UInt64, positions: npt.NDArray[np.integer]) -> Float64:
    """One number in [0, 1) for each (seed, position), on a grid of 2**-53.

    ::

        uniforms(np.array([7, 7], np.uint64), np.array([0, 1]))

    seeds: uint64[m]. positions: integers[m], 0 or more. Returns float64[m].
    """
    return (random_bits(seeds, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_bits(seeds: UInt64, positions: npt.NDArray[np.integer]) -> UInt64:
    """64 random bits for each (seed, position). Arguments as in `uniforms`. Returns uint64[m]."""
    counters = positions.astype(np.uint64) + np.uint64(1)
    return _mix(_mix(seeds) + counters * _GOLDEN_GAMMA)


def _mix(z: UInt64) -> UInt64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
