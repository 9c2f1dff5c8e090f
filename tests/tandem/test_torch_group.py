"""Real processes that exchange rows over gloo. Few tests: each starts processes that import torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from group_processes import Engine

from asyncscale.tandem.meeting import Meeting, close_meeting, open_meeting

LENGTHS = [[2, 5, 0], [0, 0, 0], [3, 1, 4]]  # from each to each


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int, int], Engine]]:
    engines: list[Engine] = []

    def start_one(engine_id: int, num_engines: int) -> Engine:
        engines.append(Engine("torch", str(tmp_path), engine_id, num_engines))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.close()


def everyone(engines: list[Engine], method: str, *args: object) -> list[object]:
    for engine in engines:
        engine.tell(method, *args)
    return [engine.hear() for engine in engines]


def meet(folder: Path, engines: list[Engine], generation: int) -> None:
    open_meeting(str(folder), generation)
    assert everyone(engines, "join", generation) == [None] * len(engines)


def expected(lengths: list[list[int]], engine_id: int) -> list[list[list[int]]]:
    return [[[source, engine_id, k] for k in range(length[engine_id])] for source, length in enumerate(lengths)]


def check_exchange(engines: list[Engine], dtype: str = "float32") -> None:
    num = len(engines)
    lengths = [length[:num] for length in LENGTHS[:num]]
    assert everyone(engines, "exchange", dtype, lengths) == [expected(lengths, i) for i in range(num)]


def test_rows_of_any_type_and_number_arrive(tmp_path: Path, start: Callable[[int, int], Engine]) -> None:
    engines = [start(i, 3) for i in range(3)]
    meet(tmp_path, engines, 1)
    for dtype in ("float32", "bfloat16", "float16", "int64", "int32", "uint8"):
        check_exchange(engines, dtype)
    nothing = [[0] * 3] * 3
    assert everyone(engines, "exchange", "float32", nothing) == [[[], [], []]] * 3
    for voter in range(3):
        for engine in engines:
            engine.tell("any", engine is engines[voter])
        assert [engine.hear() for engine in engines] == [True] * 3
    assert everyone(engines, "any", False) == [False] * 3


def test_a_dead_engine_is_noticed_and_its_successor_joins(tmp_path: Path, start: Callable[[int, int], Engine]) -> None:
    engines = [start(i, 3) for i in range(3)]
    meet(tmp_path, engines, 1)
    for engine in engines[:2]:
        engine.tell("exchange", "float32", LENGTHS)
    engines[2].kill()
    for engine in engines[:2]:
        assert "another engine is gone" in str(engine.hear())
    close_meeting(str(tmp_path), 1)
    engines[2] = start(2, 3)
    meet(tmp_path, engines, 2)
    check_exchange(engines)


def test_generations_come_and_go_and_leave_nothing(tmp_path: Path, start: Callable[[int, int], Engine]) -> None:
    engines = [start(i, 2) for i in range(2)]
    assert "in no generation" in str(everyone(engines, "any", True))

    for generation in range(1, 23):  # of some, one engine leaves in the middle of an exchange
        meet(tmp_path, engines, generation)
        check_exchange(engines)
        if generation % 2:
            engines[1].tell("exchange", "float32", [[1, 1], [1, 1]])
            assert everyone(engines[:1], "leave") == [None]
            assert "another engine is gone" in str(engines[1].hear())
        close_meeting(str(tmp_path), generation)
        if generation == 2:
            before = everyone(engines, "open_things")
    assert everyone(engines, "open_things") == before

    # Nobody waits for who does not come: not for those of a meeting that closes, nor in one that is over.
    open_meeting(str(tmp_path), 23)
    engines[0].tell("join", 23)
    Meeting(str(tmp_path), 23).get("engine/0")
    close_meeting(str(tmp_path), 23)
    assert engines[0].hear() == "CollectiveError: generation 23 is over"
    assert everyone(engines[1:], "join", 23) == ["CollectiveError: generation 23 is over"]

    # Who is stopped for a while is waited for, and shows that it waits.
    meet(tmp_path, engines, 24)
    assert not any(engine.rests for engine in engines)
    os.kill(engines[1].process.pid or 0, signal.SIGSTOP)
    engines[1].tell("any", True)
    engines[0].tell("any", False)
    engines[0].wait_until_it_rests()
    os.kill(engines[1].process.pid or 0, signal.SIGCONT)
    assert [engine.hear() for engine in engines] == [True, True]
