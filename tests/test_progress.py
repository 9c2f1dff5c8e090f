from __future__ import annotations

import time
from pathlib import Path

from asyncscale.progress import Progress, Sight, look, make_file


def test_what_the_engine_shows_is_seen(tmp_path: Path) -> None:
    path = str(tmp_path / "engine-0.0.progress")
    make_file(path)
    assert look(path) == Sight(ticks=0, resting=True, step_began=None, step_ended=None)
    progress = Progress(path)
    progress.work()
    for _ in range(3):
        progress.tick()
    assert look(path) == Sight(ticks=4, resting=False, step_began=None, step_ended=None)
    before = time.monotonic()
    progress.begin_step()
    progress.end_step()
    progress.rest()
    seen = look(path)
    assert seen is not None
    assert (seen.ticks, seen.resting) == (6, True)
    assert seen.step_began is not None
    assert seen.step_ended is not None
    assert before <= seen.step_began <= seen.step_ended <= time.monotonic()


def test_without_a_file_nothing_is_seen(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"123")
    assert look(str(tmp_path / "none")) is None
    assert look(str(tmp_path / "short")) is None


def test_an_engine_without_a_path_shows_nobody() -> None:
    Progress().end_step()
