"""The gate that front ends start together at, with visitors of this process."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack

from asyncscale.bench.gate import Gate, Visitor


async def test_it_opens_when_the_last_one_is_there_at_one_time_for_all_and_does_so_again() -> None:
    openings: list[float] = []
    opened = asyncio.Semaphore(0)

    def on_open() -> None:
        openings.append(time.monotonic())
        opened.release()

    async with AsyncExitStack() as stack:
        gate = await stack.enter_async_context(Gate(3, on_open))
        visitors = [await stack.enter_async_context(Visitor(gate.path)) for _ in range(3)]
        for number in range(2):
            early = [asyncio.create_task(visitor.pass_gate()) for visitor in visitors[:2]]
            await asyncio.wait(early, timeout=0.05)
            assert not any(task.done() for task in early)
            last_came_at = time.monotonic()
            last = await visitors[2].pass_gate()
            assert {last, *await asyncio.gather(*early)} == {last}
            assert last > last_came_at
            await opened.acquire()
            assert len(openings) == number + 1
    assert not os.path.exists(gate.path)  # noqa: ASYNC240
