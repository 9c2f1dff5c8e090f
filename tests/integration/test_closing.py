"""`start` and `close`, cancelled and called from everywhere: no hang, the right error, nothing left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from asyncscale import AsyncScaleClient, ClientClosedError, ClientStateError, SimulatedModel

FAST = SimulatedModel(base_ms=0.2, decode_us=1, prefill_us=0.1)
SLOW = SimulatedModel(base_ms=50)
LONG = {"max_tokens": 5000, "ignore_eos": True}


async def test_a_task_that_is_cancelled_again_and_again_inside_async_with_leaves_nothing() -> None:
    clients: list[AsyncScaleClient] = []

    async def use() -> None:
        async with AsyncScaleClient(FAST, num_engines=1) as client:
            clients.append(client)
            await client.generate("x", **LONG)

    for delay in (0.0, 0.1, 0.3, 0.6):
        task = asyncio.ensure_future(use())
        await asyncio.sleep(delay)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
    for client in clients:
        await client.close()  # the end of what went on without its task


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.2])
async def test_closing_while_it_starts_does_not_cancel_the_task_that_starts_it(delay: float) -> None:
    client = AsyncScaleClient(SimulatedModel(load_s=60), num_engines=1)
    outcomes: list[object] = []

    async def start() -> None:
        try:
            await client.start()
        except ClientClosedError as error:
            outcomes.append(error)
            await asyncio.sleep(0)  # would raise, had the cancellation stayed
            task = asyncio.current_task()
            outcomes.append(task.cancelling() if task else None)

    starting = asyncio.ensure_future(start())
    await asyncio.sleep(delay)
    if delay == 0.0:
        await asyncio.sleep(0)
    await asyncio.gather(client.close(), client.close(), starting)
    assert [str(outcome) for outcome in outcomes] == ["the client was closed while it started", "0"]


async def test_a_start_that_is_closed_and_cancelled_is_cancelled() -> None:
    client = AsyncScaleClient(SimulatedModel(load_s=60), num_engines=1)
    starting = asyncio.ensure_future(client.start())
    await asyncio.sleep(0.1)
    closing = asyncio.ensure_future(client.close())
    starting.cancel()
    await closing
    with pytest.raises(asyncio.CancelledError):
        await starting


async def test_leaving_async_with_while_another_task_closes() -> None:
    async with AsyncScaleClient(FAST, num_engines=1) as client:
        generation = client.generate("x", max_tokens=100, ignore_eos=True)
        closing = asyncio.ensure_future(client.close())
        await asyncio.sleep(0)
    await closing
    assert len((await generation).token_ids) == 100


async def test_a_drain_ends_with_the_task_that_waits_for_it(caplog: pytest.LogCaptureFixture) -> None:
    async def use() -> None:
        async with AsyncScaleClient(SLOW, num_engines=1) as client:
            generations.append(client.generate("x", **LONG))
            closing.set()
            await client.close(drain=True, timeout=1000)

    generations, closing = [], asyncio.Event()
    task = asyncio.ensure_future(use())
    await closing.wait()
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    with pytest.raises(ClientClosedError):
        await generations[0]
    assert caplog.records == []


async def test_a_close_that_has_no_time_at_all_goes_on_without_its_caller() -> None:
    client = await AsyncScaleClient(SLOW, num_engines=1).start()
    generation = client.generate("x", **LONG)

    async def read() -> None:
        try:
            await generation
        finally:
            await asyncio.wait_for(client.close(), 0)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(), 0.01)
    await asyncio.wait_for(client.close(), 5)
    with pytest.raises(ClientClosedError):
        client.generate("late")


@pytest.mark.parametrize("call", [AsyncScaleClient.close, AsyncScaleClient.start], ids=["close", "start"])
async def test_another_threads_loop_is_refused_and_harms_nothing(call: Callable[..., object]) -> None:
    async with AsyncScaleClient(FAST, num_engines=1) as client:
        with pytest.raises(ClientStateError):
            await asyncio.to_thread(asyncio.run, call(client))
        assert len((await client.generate("x", max_tokens=3, ignore_eos=True)).token_ids) == 3


async def test_another_threads_loop_may_attach() -> None:
    async with AsyncScaleClient(FAST, num_engines=1) as client:

        async def ask() -> int:
            async with AsyncScaleClient.attach(client.address) as mine:
                return len((await mine.generate("x", max_tokens=3, ignore_eos=True)).token_ids)

        assert await asyncio.to_thread(asyncio.run, ask()) == 3
