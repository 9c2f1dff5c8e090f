from __future__ import annotations

import pytest

from asyncscale.engine.profiler import Profiler


def test_the_profile_names_the_functions_that_ran_slowest_first() -> None:
    profiler = Profiler()
    assert profiler.profile() is None
    sorted(range(100_000), key=lambda number: -number)
    functions = profiler.profile(False)
    assert functions is not None
    by_name = {str(entry["function"]).rpartition("(")[2]: entry for entry in functions}
    assert by_name["<lambda>)"]["calls"] == 100_000
    own = [entry["own_s"] for entry in functions]
    assert own == sorted(own, reverse=True)


@pytest.mark.parametrize("calls", [(False,), (True, True), (1,)])
def test_what_makes_no_sense_is_refused(calls: tuple[bool, ...]) -> None:
    profiler = Profiler()
    *before, last = calls
    for call in before:
        profiler.profile(call)
    with pytest.raises((RuntimeError, ValueError)):
        profiler.profile(last)
    if before:
        profiler.profile(False)
