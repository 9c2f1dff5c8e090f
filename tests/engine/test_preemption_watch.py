"""Many preemptions are said, and once."""

from __future__ import annotations

import pytest

from asyncscale.engine.preemption_watch import PreemptionWatch


def test_a_few_preemptions_are_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    watch = PreemptionWatch()
    for minute in range(10):
        watch.add(9, 60.0 * minute)
    assert caplog.records == []


def test_many_are_said_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    watch = PreemptionWatch()
    for second in range(119):
        watch.add(1, float(second))
    assert len(caplog.messages) == 2
    assert "within 9 s, 10 times a request lost its blocks" in caplog.messages[0]
    assert "kv_cache_memory_fraction" in caplog.messages[0]
