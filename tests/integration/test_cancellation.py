"""Requests that end early, thousands of them, each at a random moment and in a random way: nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from asyncscale import (
    AsyncScaleClient,
    ClientClosedError,
    Generation,
    RequestAbortedError,
    RequestTimeoutError,
    SimulatedModel,
)

# A small vocabulary, so that the table of tokens' texts is soon complete.
MODEL = SimulatedModel(base_ms=0.2, decode_us=1, prefill_us=2, vocab_size=300)
MAX_TOKENS = 40


@pytest.fixture
async def client() -> AsyncIterator[AsyncScaleClient]:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))  # whose threads do not vary
    # Prompts of thousands of tokens take many steps, and requests wait at the engines and here.
    async with AsyncScaleClient(MODEL, num_engines=2, max_num_batched_tokens=256, max_num_seqs=32) as client:
        yield client


async def pause(rng: random.Random) -> None:
    """Some turns of the event loop, or some steps of an engine."""
    for _ in range(rng.choice([0, 0, 1, 2])):
        await asyncio.sleep(0)
    if rng.random() < 0.7:
        await asyncio.sleep(rng.random() * 0.03)


# --- ways to end a request; each is given a new one


async def forget(generation: Generation, rng: random.Random) -> None:
    """The caller's reference is the last one."""


async def abort(generation: Generation, rng: random.Random) -> None:
    await pause(rng)
    generation.abort()
    generation.abort()


async def abort_at_a_token(generation: Generation, rng: random.Random) -> None:
    last = rng.choice([0, 1, rng.randrange(MAX_TOKENS), MAX_TOKENS - 1])
    async for token in generation:
        if token.index == last:
            generation.abort()


async def leave_the_loop(generation: Generation, rng: random.Random) -> None:
    last = rng.choice([0, 1, rng.randrange(MAX_TOKENS), MAX_TOKENS - 1])
    async for token in generation:
        if token.index == last:
            break


async def time_out(generation: Generation, rng: random.Random) -> None:
    async with asyncio.timeout(rng.random() * 0.03):
        await generation


async def read_twice_and_cancel_both_twice(generation: Generation, rng: random.Random) -> None:
    async def read() -> None:
        async for _ in generation:
            pass

    async def complete() -> None:
        await generation

    tasks = [asyncio.ensure_future(read()), asyncio.ensure_future(complete())]
    try:
        await pause(rng)
        for _ in range(2):
            for task in tasks:
                task.cancel()
            await pause(rng)
    finally:
        await asyncio.gather(*tasks, return_exceptions=True)


async def finish(generation: Generation, rng: random.Random) -> None:
    await generation


WAYS: list[Callable[[Generation, random.Random], Awaitable[None]]] = [
    forget,
    abort,
    abort_at_a_token,
    leave_the_loop,
    time_out,
    read_twice_and_cancel_both_twice,
    finish,
]


async def request(client: AsyncScaleClient, rng: random.Random) -> None:
    options: dict[str, Any] = {
        "max_tokens": rng.choice([1, MAX_TOKENS]),
        "n": rng.choice([1, 1, 1, 3]),
        "timeout": rng.choice([None, None, rng.random() * 0.05]),
        "engine": rng.choice([None, None, 0, 1]),
        "stop": rng.choice([None, None, ["e"]]),
    }
    way = rng.choice(WAYS)
    prompt = [1] * rng.choice([3, 20, 3000])
    prompt[0] = rng.randrange(5)  # few beginnings, which the table of prefixes soon knows
    with contextlib.suppress(RequestAbortedError, RequestTimeoutError, TimeoutError, ClientClosedError):
        await way(client.generate(prompt, ignore_eos=True, **options), rng)


async def storm(client: AsyncScaleClient, rng: random.Random, count: int) -> None:
    """So many requests, a few hundred at a time; a third of the tasks are cancelled from outside, too."""
    places = asyncio.Semaphore(300)

    async def run() -> None:
        async with places:
            task = asyncio.ensure_future(request(client, rng))
            if rng.random() < 0.3:
                await pause(rng)
                task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            assert result is None or isinstance(result, asyncio.CancelledError), result

    await asyncio.gather(*(run() for _ in range(count)))


async def storm_of_a_client_that_closes(address: str, rng: random.Random) -> None:
    other = await AsyncScaleClient.attach(address).start()
    requests = [asyncio.ensure_future(request(other, rng)) for _ in range(100)]
    await pause(rng)
    await other.close(drain=False)
    for result in await asyncio.gather(*requests, return_exceptions=True):
        assert result is None, result


async def storm_with_company(client: AsyncScaleClient, rng: random.Random, count: int) -> None:
    others = (storm_of_a_client_that_closes(client.address, rng) for _ in range(2))
    await asyncio.gather(storm(client, rng, count), *others)


async def assert_nothing_is_left(client: AsyncScaleClient) -> None:
    """Engines, dispatcher and router agree that there is nothing under way."""
    async with asyncio.timeout(10):
        async for loads in client.watch_loads():
            if all(load.in_flight == load.running == load.waiting == load.mine == 0 for load in loads):
                break
    for stats in await client.collective_rpc("kv_cache_stats"):
        assert (stats["free_blocks"], stats["used_blocks"]) == (stats["num_blocks"], 0)
    dispatcher = client._dispatcher
    await asyncio.sleep(0)  # aborted requests that were held back are dropped in the next turn
    assert (dispatcher.num_live, dispatcher._live.choices, dispatcher._stranded) == (0, {}, {})
    assert (len(dispatcher._held), dispatcher._held.num_tokens, dispatcher._held._heap) == (0, 0, [])
    assert dispatcher._load_waiters == set()
    assert [(engine.mine, engine.my_tokens) for engine in dispatcher._router._engines.values()] == [(0, 0), (0, 0)]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_ten_thousand_requests_that_end_at_random_moments_leave_nothing(
    client: AsyncScaleClient, caplog: pytest.LogCaptureFixture
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    me = psutil.Process()
    await storm_with_company(client, rng, 500)
    before = me.num_fds(), threading.active_count()
    traced = []
    for _ in range(4):
        tracemalloc.start()
        try:
            await storm_with_company(client, rng, 2500)
            await assert_nothing_is_left(client)
            gc.collect()
            traced.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    print("bytes that each storm left", traced)
    assert (me.num_fds(), threading.active_count()) == before
    assert min(traced) < 100_000  # 40 bytes per request
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    for engine in client._engines.supervisor.engines.values():  # type: ignore[attr-defined]
        assert engine.stderr_tail() == ""
