"""Engines run where their owner put them, and it alone decides."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
import pytest

from asyncscale import AsyncScaleClient, SimulatedModel

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs to choose from"
)


async def masks(client: AsyncScaleClient) -> list[set[int]]:
    """Per engine, of all its threads."""
    found = []
    for info in await client.collective_rpc("process_info"):
        threads = [set(os.sched_getaffinity(thread.id)) for thread in psutil.Process(info["pid"]).threads()]
        assert all(mask == threads[0] for mask in threads)
        found.append(threads[0])
    return found


async def test_engines_divide_the_cpus_and_go_back_to_their_own_when_started_again() -> None:
    usable = os.sched_getaffinity(0)
    async with AsyncScaleClient(SimulatedModel(), num_engines=2) as client:
        first, second = before = await masks(client)
        assert first | second == usable
        assert first & second == set()
        (pid, _) = [info["pid"] for info in await client.collective_rpc("process_info")]
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            async for _ in client.watch_loads():
                if [engine.restarts for engine in client.health()] == [1, 0] and len(client.engine_loads()) == 2:
                    break
        assert await masks(client) == before
        assert os.sched_getaffinity(0) == usable  # the owner stays where it was


@pytest.mark.parametrize(("num_engines", "options"), [(1, {}), (2, {"pin_engines": False})])
async def test_where_there_is_nothing_to_divide_or_nobody_wants_it_nobody_is_bound(
    num_engines: int, options: dict[str, bool]
) -> None:
    async with AsyncScaleClient(SimulatedModel(), num_engines=num_engines, **options) as client:
        assert await masks(client) == [os.sched_getaffinity(0)] * num_engines
