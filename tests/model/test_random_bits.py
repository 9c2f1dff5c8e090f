"""The counter-based generator: known values, uniformity, and no relation between neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from asyncscale.model.random_bits import random_bits, uniforms

LAST_SEED = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15  # what SplitMix64 adds from one output to the next
ALONG = {
    "positions of one seed": lambda n: (np.full(n, 12345, np.uint64), np.arange(n)),
    "consecutive seeds": lambda n: (np.arange(n, dtype=np.uint64), np.full(n, 7)),
    "seeds a power of two apart": lambda n: (np.arange(n, dtype=np.uint64) << np.uint64(40), np.full(n, 7)),
    "seeds one gamma apart": lambda n: (np.arange(n, dtype=np.uint64) * np.uint64(GAMMA), np.full(n, 7)),
    "seed and position together": lambda n: (np.arange(n, dtype=np.uint64), np.arange(n)),
}
along = pytest.mark.parametrize("counters", ALONG.values(), ids=ALONG.keys())


def test_seed_zero_gives_the_published_splitmix64_sequence():
    bits = random_bits(np.zeros(3, np.uint64), np.arange(3))
    assert [hex(value) for value in bits.tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_extreme_counters_give_numbers_in_the_half_open_unit_interval():
    seeds = np.array([0, LAST_SEED, LAST_SEED, 2**63], np.uint64)
    values = uniforms(seeds, np.array([2**31 - 1, 0, 2**31 - 1, 1], np.int32))
    assert ((values >= 0) & (values < 1)).all()
    assert len(set(values.tolist())) == 4


def test_largest_bits_stay_below_one(monkeypatch):
    monkeypatch.setattr("asyncscale.model.random_bits.random_bits", lambda *_: np.array([LAST_SEED], np.uint64))
    assert uniforms(np.zeros(1, np.uint64), np.zeros(1, np.int32))[0] == 1 - 2.0**-53


@along
def test_values_are_uniform(counters):
    values = uniforms(*counters(200_000))
    assert stats.chisquare(np.histogram(values, 512, (0, 1))[0]).pvalue > 1e-3


@along
def test_neighbours_are_independent(counters):
    values = uniforms(*counters(200_000))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(len(values))
    pairs = np.histogram2d(values[::2], values[1::2], 32, [(0, 1), (0, 1)])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


@along
def test_every_bit_is_set_half_the_time(counters):
    bits = random_bits(*counters(50_000))
    ones = [int(((bits >> np.uint64(i)) & np.uint64(1)).sum()) for i in range(64)]
    assert stats.binomtest(min(ones), 50_000).pvalue > 1e-5
    assert stats.binomtest(max(ones), 50_000).pvalue > 1e-5


def test_one_changed_bit_of_the_seed_changes_half_of_the_output():
    rng = np.random.default_rng(0)
    seeds, positions = rng.integers(0, 2**64, 2000, np.uint64), rng.integers(0, 8192, 2000)
    before = random_bits(seeds, positions)
    for bit in range(64):
        changed = before ^ random_bits(seeds ^ (np.uint64(1) << np.uint64(bit)), positions)
        assert 31 < np.unpackbits(changed.view(np.uint8)).sum() / 2000 < 33


@pytest.mark.parametrize("step", [1, 2**32, GAMMA])
def test_streams_of_different_seeds_do_not_overlap(step):
    seeds = np.repeat(np.arange(100, dtype=np.uint64) * np.uint64(step), 1000)
    assert len(np.unique(random_bits(seeds, np.tile(np.arange(1000), 100)))) == 100_000
