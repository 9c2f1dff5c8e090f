from __future__ import annotations

import pytest

from asyncscale.client.hang_detector import HangDetector, Observation


def first_hang(observations: list[Observation], interval: float = 1.0, timeout: float = 10.0) -> int | None:
    """The index of the observation at which the engine is found to hang."""
    detector = HangDetector(timeout, interval)
    return next((i for i, seen in enumerate(observations) if detector.observe(seen, i * interval)), None)


def test_an_engine_that_rests_never_hangs() -> None:
    assert first_hang([Observation(7, resting=True, cpu_s=1.0)] * 1000) is None


def test_a_step_however_long_with_progress_is_no_hang() -> None:
    assert first_hang([Observation(i // 5, resting=False, cpu_s=1.0) for i in range(1000)]) is None


def test_a_step_that_neither_computes_nor_progresses_hangs_after_the_timeout() -> None:
    busy = [Observation(i, resting=False, cpu_s=float(i)) for i in range(5)]
    stuck = [Observation(4, resting=False, cpu_s=4.0)] * 20
    assert first_hang(busy + stuck) == 4 + 10


def test_one_that_computes_without_progress_is_given_ten_times_as_long() -> None:
    assert first_hang([Observation(0, resting=False, cpu_s=float(i)) for i in range(200)]) in (
        100,
        101,
    )  # a sum of tenths


def test_without_knowledge_of_the_cpu_silence_counts() -> None:
    assert first_hang([Observation(0, resting=False)] * 20) == 10


@pytest.mark.parametrize("resting", [True, False])
def test_a_stopped_process_hangs_after_a_tenth_of_the_timeout(resting: bool) -> None:
    well = Observation(3, resting, cpu_s=1.0)
    stopped = Observation(3, resting, stopped=True, cpu_s=1.0)
    assert first_hang([well, *[stopped] * 10]) in (2, 3)


def test_one_that_is_stopped_for_a_moment_and_goes_on_does_not_hang() -> None:
    moments = [Observation(i, resting=False, stopped=i % 2 == 0, cpu_s=1.0) for i in range(1000)]
    assert first_hang(moments) is None


def test_when_the_observer_was_stopped_too_that_time_does_not_count() -> None:
    """Ctrl-Z stops the whole group for an hour; after fg the first look finds no progress since the last one."""
    detector = HangDetector(timeout=10.0, interval=1.0)
    stuck = Observation(4, resting=False, stopped=False, cpu_s=4.0)
    assert not detector.observe(stuck, 0.0)
    assert not detector.observe(stuck, 3600.0)


def test_progress_wipes_out_what_was_counted() -> None:
    detector = HangDetector(timeout=10.0, interval=1.0)
    for round_ in range(20):
        for second in range(10):
            assert not detector.observe(Observation(round_, resting=False, cpu_s=0.0), round_ * 10.0 + second)
