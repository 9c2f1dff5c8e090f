"""The machine's limits: that they are measured, and that all that is counted is done."""

from __future__ import annotations

import numpy as np
import pytest

from asyncscale.kernels.library import FORMATS, INSTRUCTION_SETS, Format, load_library
from asyncscale.kernels.limits import Limits, best_limits, measure_limits

ISAS = [isa for isa in INSTRUCTION_SETS if load_library(isa)]


@pytest.mark.parametrize("isa", ISAS)
def test_limits_are_positive_for_every_format(isa: str) -> None:
    library = load_library(isa)
    assert library is not None
    limits = measure_limits(library, 2, tuple(FORMATS), scale=0.001)
    assert limits.num_threads in (1, 2)
    assert limits.operations_per_s.keys() == FORMATS.keys()
    assert all(0 < limit < np.inf for limit in (limits.bytes_per_s, *limits.operations_per_s.values()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
def test_operations_are_counted_on_each_thread(isa: str, name: Format) -> None:
    library = load_library(isa)
    assert library is not None
    measure_limits(library, 1, (name,), scale=0.001)  # which tells ctypes what the functions take
    counts = []
    for num_threads, num_times in ((1, 1), (1, 3), (2, 3)):
        team = library.cdll.asyncscale_team_new(num_threads)
        size = library.cdll.asyncscale_team_size(team)
        counts.append(library.cdll.asyncscale_multiply(FORMATS[name], num_times, 100, team) / size / num_times)
        library.cdll.asyncscale_team_delete(team)
    elements = {"float32": 1, "bfloat16": 2, "int8": 4}[name]
    assert counts[0] % (2 * 100 * elements) == 0
    assert counts == counts[:1] * 3


def test_the_best_of_two_measurements_is_taken_of_each_limit() -> None:
    best = best_limits(Limits(2, 5.0, {"int8": 1.0, "float32": 7.0}), Limits(2, 4.0, {"int8": 2.0, "float32": 6.0}))
    assert best == Limits(2, 5.0, {"int8": 2.0, "float32": 7.0})
