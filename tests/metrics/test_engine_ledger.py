"""What an engine counts stays, through its deaths and restarts."""

from __future__ import annotations

from pathlib import Path

from asyncscale.metrics.catalog import ENGINE_LAYOUT as LAYOUT
from asyncscale.metrics.engine_counters import EngineCounters, make_file, read_file
from asyncscale.metrics.engine_ledger import EngineLedger


def start(path: Path) -> EngineCounters:
    make_file(str(path))
    return EngineCounters(str(path))


def test_counts_of_all_incarnations_add_up_and_gauges_are_of_the_living_one(tmp_path: Path) -> None:
    ledger = EngineLedger()
    assert ledger.read() == {}
    first = start(tmp_path / "0.0")
    ledger.up(0, str(tmp_path / "0.0"))
    first.step(num_tokens=100, num_generated=4)
    first._cells[LAYOUT.at("num_requests_running")] = 4
    seen = LAYOUT.read(ledger.read()[0])
    assert (seen.engine_up, seen.num_requests_running, seen.generation_tokens) == (1, 4, 4)
    first.step(num_tokens=4, num_generated=4)  # nobody has looked since
    ledger.down(0, hung=True)
    (tmp_path / "0.0").unlink()
    seen = LAYOUT.read(ledger.read()[0])
    assert (seen.engine_up, seen.num_requests_running, seen.generation_tokens) == (0, 0, 8)
    assert (seen.engine_deaths, seen.engine_hangs) == (1, 1)
    ledger.down(0, hung=False)  # the second one died before it was ready
    second = start(tmp_path / "0.2")
    ledger.up(0, str(tmp_path / "0.2"))
    second.step(num_tokens=1, num_generated=1)
    seen = LAYOUT.read(ledger.read()[0])
    assert (seen.engine_up, seen.generation_tokens, seen.iteration_tokens_total.sum) == (1, 9, 105)
    assert (seen.engine_deaths, seen.engine_hangs, seen.engine_restarts) == (2, 1, 1)


def test_a_file_that_is_no_such_file_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"123")
    (tmp_path / "long").write_bytes(bytes(8 * LAYOUT.size + 8))
    assert [read_file(str(tmp_path / name)) for name in ("none", "short", "long")] == [None, None, None]
    ledger = EngineLedger()
    ledger.up(3, str(tmp_path / "none"))
    assert LAYOUT.read(ledger.read()[3]).engine_up == 1
