"""Calls to all engines at once, with real engine processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asyncscale import AsyncScaleClient, EngineDeadError, EngineError, SimulatedModel, run_frontends

MODEL = SimulatedModel(base_ms=1, decode_us=1, prefill_us=0.1)
LONG: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True}
METHODS = [
    *["drain", "kv_cache_stats", "pause", "process_info", "profile", "reset_prefix_cache", "resume"],
    "speculation_stats",
]


@pytest.fixture
async def owner() -> AsyncIterator[AsyncScaleClient]:
    # Some tests stop engines, or end them for good.
    async with AsyncScaleClient(MODEL, num_engines=3, max_restarts=0, hang_timeout=None) as owner:
        yield owner


@pytest.fixture(params=["owner", "attached"])
async def client(owner: AsyncScaleClient, request: pytest.FixtureRequest) -> AsyncIterator[AsyncScaleClient]:
    """Whoever calls: both must see the same."""
    if request.param == "owner":
        yield owner
        return
    async with AsyncScaleClient.attach(owner.address) as client:
        yield client


def pids(owner: AsyncScaleClient) -> list[int]:
    """Of the engines, in their order."""
    engines = owner._engines.supervisor.engines  # type: ignore[attr-defined]
    return [engines[engine_id].pid for engine_id in sorted(engines)]


def versions(client: AsyncScaleClient) -> list[int]:
    """How many changes of its load each engine has told the client of."""
    loads = (client._dispatcher.newest_load(load.engine_id) for load in client.engine_loads())
    return [-1 if load is None else load.version for load in loads]


async def wait_versions(client: AsyncScaleClient, wanted: list[int]) -> None:
    async with asyncio.timeout(10):
        while versions(client) != wanted:
            await client._dispatcher.wait_load_change()


async def wait_running(client: AsyncScaleClient, count: int) -> None:
    """Until the engines themselves say that so many requests run."""
    async with asyncio.timeout(10):
        async for loads in client.watch_loads():
            if sum(load.running for load in loads) == count:
                return


# --- results


async def test_results_come_in_engine_order_also_while_requests_run(
    owner: AsyncScaleClient, client: AsyncScaleClient
) -> None:
    generations = [client.generate("hello", **LONG) for _ in range(9)]
    await wait_running(client, 9)
    for _ in range(20):
        infos = await client.collective_rpc("process_info")
        assert [info["pid"] for info in infos] == pids(owner)
    assert [stats["num_blocks"] for stats in await client.collective_rpc("kv_cache_stats")] == [MODEL.num_kv_blocks] * 3
    assert not any(generation.done for generation in generations)


async def test_each_engine_runs_a_call_exactly_once_also_while_requests_run(owner: AsyncScaleClient) -> None:
    """A profiler that is started twice, or ended without a start, says so."""

    async def main(client: AsyncScaleClient, index: int) -> int:
        tables = []
        for _ in range(10):
            await client.collective_rpc("profile", True)
            tables += await client.collective_rpc("profile", False)
        return len(tables)

    generations = [owner.generate("hello", **LONG) for _ in range(6)]
    await wait_running(owner, 6)
    assert await run_frontends(main, 1, owner.address) == [30]
    assert await main(owner, 0) == 30
    assert not any(generation.done for generation in generations)


async def test_calls_of_several_processes_leave_all_engines_in_the_same_state(owner: AsyncScaleClient) -> None:
    """Whichever call came last, it did so everywhere; and every change happened as often on each engine."""

    async def main(client: AsyncScaleClient, index: int) -> None:
        for method in ("pause", "resume", "drain", "resume") * 10 + (("pause", "drain")[index],):
            await client.collective_rpc(method)

    generations = [owner.generate("hello", **LONG) for _ in range(6)]
    await wait_running(owner, 6)
    before = versions(owner)
    await run_frontends(main, 2, owner.address)
    changes = {after - start for after, start in zip(versions(owner), before, strict=True)}
    assert len(changes) == 1
    assert [load.accepting for load in owner.engine_loads()] == [False] * 3
    assert not any(generation.done for generation in generations)


async def test_profile_gives_each_engines_table(client: AsyncScaleClient) -> None:
    assert await client.collective_rpc("profile", True) == [None, None, None]
    await asyncio.gather(*(client.generate("hello", max_tokens=20, ignore_eos=True) for _ in range(6)))
    for table in await client.collective_rpc("profile", False):
        assert any("step" in row["function"] and row["calls"] >= 20 for row in table)
    with pytest.raises(EngineError, match="not running"):
        await client.collective_rpc("profile", False)


async def test_reset_prefix_cache_reaches_every_engine(client: AsyncScaleClient) -> None:
    prompt = "a prompt of several blocks " * 10
    for engine_id in (0, 1, 2):
        await client.generate(prompt, max_tokens=2, engine=engine_id)
    assert all(stats["cached_blocks"] > 0 for stats in await client.collective_rpc("kv_cache_stats"))
    await client.collective_rpc("reset_prefix_cache")
    assert [stats["cached_blocks"] for stats in await client.collective_rpc("kv_cache_stats")] == [0, 0, 0]


# --- errors


@pytest.mark.parametrize("name", ["nonsense", "__init__", "step", "methods", "kv_cache_stats.__self__", ""])
async def test_unknown_names_are_refused_and_the_known_ones_listed(client: AsyncScaleClient, name: str) -> None:
    with pytest.raises(EngineError, match=f"known are {', '.join(METHODS)}$") as caught:
        await client.collective_rpc(name)
    assert caught.value.engine_id == 0


async def test_wrong_arguments_are_refused(client: AsyncScaleClient) -> None:
    with pytest.raises(EngineError, match="TypeError"):
        await client.collective_rpc("pause", 1, 2, 3)
    with pytest.raises(EngineError, match="is_start must be true or false"):
        await client.collective_rpc("profile", "yes")
    assert all(load.accepting for load in client.engine_loads())


async def test_an_engine_that_dies_before_it_answers_raises_its_death(
    owner: AsyncScaleClient, client: AsyncScaleClient
) -> None:
    pid = pids(owner)[1]
    os.kill(pid, signal.SIGSTOP)
    call = asyncio.ensure_future(client.collective_rpc("process_info"))
    waiting = owner._dispatcher._fleet._connections
    async with asyncio.timeout(10):
        while waiting[0]._calls or not waiting[1]._calls:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert not call.done()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="engine 1 died") as caught:
        await call
    assert caught.value.engine_id == 1
    async with asyncio.timeout(10):
        while len(client.engine_loads()) == 3:
            await client._dispatcher.wait_load_change()
    assert [info["pid"] for info in await client.collective_rpc("process_info")] == pids(owner)


async def test_a_timeout_leaves_nothing_behind_and_the_call_runs_all_the_same(
    owner: AsyncScaleClient, client: AsyncScaleClient
) -> None:
    pid = pids(owner)[2]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError, match="not every engine has answered"):
        await client.collective_rpc("pause", timeout=0.05)
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert len(tasks) == (client is not owner)  # the coordinator's, which waits for the engine
    os.kill(pid, signal.SIGCONT)
    await asyncio.gather(*tasks)
    await wait_versions(client, [1, 1, 1])
    assert not any(load.accepting for load in client.engine_loads())
    assert not any(connection._calls for connection in owner._dispatcher._fleet._connections.values())


# --- pause and drain


@pytest.mark.parametrize("method", ["pause", "drain"])
async def test_the_caller_knows_with_the_answer_that_engines_take_no_requests(
    client: AsyncScaleClient, method: str
) -> None:
    for _ in range(10):
        await client.collective_rpc(method)
        assert [load.accepting for load in client.engine_loads()] == [False] * 3
        await client.collective_rpc("resume")
        assert [load.accepting for load in client.engine_loads()] == [True] * 3


@pytest.mark.parametrize("method", ["pause", "drain"])
async def test_requests_are_held_while_no_engine_takes_them_and_served_after_resume(
    owner: AsyncScaleClient, client: AsyncScaleClient, method: str
) -> None:
    await client.collective_rpc(method)
    generations = [client.generate("hello", max_tokens=30, ignore_eos=True) for _ in range(6)]
    for stats in await client.collective_rpc("kv_cache_stats"):  # sent after them, had they been sent
        assert stats["used_blocks"] == 0
    assert [load.mine for load in client.engine_loads()] == [0, 0, 0]
    assert not any(generation.done for generation in generations)
    await owner.collective_rpc("resume")
    completions = await asyncio.gather(*generations)
    assert [len(completion.token_ids) for completion in completions] == [30] * 6


async def test_what_is_there_waits_out_a_pause_and_ends_in_a_drain(
    owner: AsyncScaleClient, client: AsyncScaleClient
) -> None:
    generations = [client.generate("hello", max_tokens=400, ignore_eos=True) for _ in range(6)]
    await wait_running(client, 6)
    await client.collective_rpc("pause")
    held = client.generate("held", max_tokens=5, ignore_eos=True)
    blocks = [stats["used_blocks"] for stats in await client.collective_rpc("kv_cache_stats")]
    assert all(blocks)
    assert [stats["used_blocks"] for stats in await owner.collective_rpc("kv_cache_stats")] == blocks
    await client.collective_rpc("resume")
    await client.collective_rpc("drain")
    assert [len((await generation).token_ids) for generation in generations] == [400] * 6
    await client.collective_rpc("resume")
    assert len((await held).token_ids) == 5


async def test_one_paused_engine_gets_nothing_while_others_do(owner: AsyncScaleClient) -> None:
    """As when a call reached it and not the others: told by its counts alone."""
    connection = owner._dispatcher._fleet[1]
    assert (await connection.call("pause", [])).error is None
    async with AsyncScaleClient.attach(owner.address) as other:
        for client in (owner, other):
            generations = [client.generate("hello", **LONG) for _ in range(10)]
            mine = [load.mine for load in client.engine_loads()]
            assert mine[1] == 0
            assert sum(mine) == 10
            for generation in generations:
                generation.abort()


async def test_without_any_engine_left_a_call_raises_how_the_last_one_died() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as owner:
        os.kill(pids(owner)[0], signal.SIGKILL)
        async with asyncio.timeout(10):
            async for loads in owner.watch_loads():
                if not loads:
                    break
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await owner.collective_rpc("kv_cache_stats")
