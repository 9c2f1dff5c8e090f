"""More load than there is room for: fair shares, limits, timeouts."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asyncscale import (
    AsyncScaleClient,
    ClientClosedError,
    EngineDeadError,
    Generation,
    OverloadedError,
    RequestTimeoutError,
    SimulatedModel,
)

MODEL = SimulatedModel(base_ms=0.5, decode_us=1, prefill_us=0.1)
SHORT: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
LONG: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True}


async def assert_idle(client: AsyncScaleClient) -> None:
    """Every engine's own counts, and this client's, are back at zero, and every KV block is free."""
    async with asyncio.timeout(20):
        async for loads in client.watch_loads():
            if not any(load.in_flight or load.running or load.waiting for load in loads):
                break
    for stats in await client.collective_rpc("kv_cache_stats"):
        assert stats["free_blocks"] == stats["num_blocks"]


def kill(client: AsyncScaleClient, engine_id: int) -> None:
    os.kill(client._engines.supervisor.engines[engine_id].pid, signal.SIGKILL)  # type: ignore[attr-defined]


# --- fair shares


@pytest.mark.parametrize("pinned", [False, True])
async def test_a_client_that_floods_does_not_starve_another(pinned: bool) -> None:
    """The flood is 2,000 requests deep; the modest client's, one after the other, each wait for one slot at most."""
    async with AsyncScaleClient(MODEL, num_engines=1, max_num_seqs=8) as flooder:
        flood = [flooder.generate("flood", engine=0 if pinned else None, **SHORT) for _ in range(2000)]
        async with AsyncScaleClient.attach(flooder.address) as modest:
            for _ in range(5):
                await modest.generate("hello", **SHORT)
            # Eight run at once, each for 20 steps: the flood goes through about five rounds of them meanwhile.
            assert sum(generation.done for generation in flood) < 500
            together = [modest.generate("hello", **SHORT) for _ in range(4)]
            await asyncio.gather(*together)
            assert sum(generation.done for generation in flood) < 1000
        for generation in flood:
            generation.abort()
        await assert_idle(flooder)


async def test_two_floods_share_the_slots() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2, max_num_seqs=8) as one:
        async with AsyncScaleClient.attach(one.address) as other:
            floods = [[client.generate("flood", **SHORT) for _ in range(600)] for client in (one, other)]
            await asyncio.gather(*floods[0][:300])
            done = [sum(generation.done for generation in flood) for flood in floods]
            assert min(done) > 0.5 * max(done), done
            for generation in [*floods[0], *floods[1]]:
                generation.abort()
        await assert_idle(one)


# --- limits


async def fill(client: AsyncScaleClient, count: int) -> list[Generation]:
    """So many requests that run until they are aborted."""
    generations = [client.generate("long", **LONG) for _ in range(count)]
    await until_running(client, count)
    return generations


async def until_running(client: AsyncScaleClient, count: int) -> None:
    async with asyncio.timeout(10):
        async for loads in client.watch_loads():
            if sum(load.running for load in loads) == count:
                break


@pytest.fixture
async def small() -> AsyncIterator[AsyncScaleClient]:
    """Two slots on each of two engines, and places for three requests, or 30 tokens, that wait."""
    async with AsyncScaleClient(
        MODEL, num_engines=2, max_num_seqs=2, max_queued_requests=3, max_queued_tokens=30
    ) as client:
        yield client
        await assert_idle(client)


async def test_beyond_the_limit_generate_refuses_at_once_and_before_any_work(
    small: AsyncScaleClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await fill(small, 4)
    held = [small.generate([1, 2, 3], **SHORT) for _ in range(3)]

    def encode(prompt: object) -> None:
        raise AssertionError("a request that is refused was encoded")

    with monkeypatch.context() as patch:
        patch.setattr("asyncscale.client.preparation.Preparation.encode_prompt", encode)
        for prompt in ("text", [1, 2]):
            with pytest.raises(OverloadedError, match="max_queued_requests is 3"):
                small.generate(prompt, **SHORT)  # type: ignore[arg-type]
    held.pop().abort()  # its place is free at once
    held.append(small.generate([1, 2, 3], **SHORT))
    running[0].abort()
    await asyncio.gather(*held)
    for generation in running:
        generation.abort()


async def test_prompt_tokens_are_counted_exactly(small: AsyncScaleClient) -> None:
    running = await fill(small, 4)
    held = [small.generate([7] * 20, **SHORT)]
    with pytest.raises(OverloadedError, match="max_queued_tokens is 30"):
        small.generate([7] * 11, **SHORT)
    held.append(small.generate([7] * 10, **SHORT))
    with pytest.raises(OverloadedError, match="max_queued_tokens is 30"):
        small.generate([7], **SHORT)
    for generation in running:
        generation.abort()
    await asyncio.gather(*held)


async def test_a_burst_into_free_slots_is_never_refused(small: AsyncScaleClient) -> None:
    burst = [small.generate("hello", **SHORT) for _ in range(4 + 3)]
    with pytest.raises(OverloadedError):
        small.generate("hello", **SHORT)
    await asyncio.gather(*burst)


async def test_requests_pinned_to_a_full_engine_are_limited_too(small: AsyncScaleClient) -> None:
    pinned = [small.generate("hello", engine=1, **SHORT) for _ in range(2 + 3)]
    with pytest.raises(OverloadedError, match="wait at engine 1"):
        small.generate("hello", engine=1, **SHORT)
    assert {done.timing.engine for done in await asyncio.gather(*pinned)} == {1}


async def test_submit_waits_in_turn_where_generate_refuses(small: AsyncScaleClient) -> None:
    running = await fill(small, 4)
    held = [small.generate([1], **SHORT) for _ in range(3)]
    order: list[str] = []

    async def submit(name: str, priority: int = 0) -> None:
        generation = await small.submit("hello", priority=priority, **SHORT)
        order.append(name)
        await generation

    submitting = []
    for name, priority in (("first", 0), ("second", 0), ("urgent", -1)):
        submitting.append(asyncio.ensure_future(submit(name, priority)))
        await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="3 requests of this client wait"):
        small.generate("hello", **SHORT)
    assert order == []
    for generation in running:
        generation.abort()
    await asyncio.gather(*held, *submitting)
    assert order == ["urgent", "first", "second"]


async def test_a_submit_that_is_cancelled_when_it_gets_its_place_passes_it_on(small: AsyncScaleClient) -> None:
    running = await fill(small, 4)
    held = [small.generate([1], **LONG) for _ in range(3)]
    cancelled, next_one = (asyncio.ensure_future(small.submit("hello", **SHORT)) for _ in range(2))
    await asyncio.sleep(0)
    held[0].abort()
    small._dispatcher._dispatch_held()  # its place is given away in this very tick
    assert len(small._dispatcher._admission) == 1
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    generation = await asyncio.wait_for(next_one, 10)
    for other in [*running, *held]:
        other.abort()
    await generation


async def test_a_slot_that_is_free_goes_to_who_waits_not_to_a_newcomer() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, max_num_seqs=1, max_queued_requests=0) as client:
        running = await fill(client, 1)
        waiting = asyncio.ensure_future(client.submit("hello", **SHORT))
        await asyncio.sleep(0)
        running[0].abort()
        with pytest.raises(OverloadedError):
            client.generate("newcomer", **SHORT)
        await (await waiting)


async def test_submit_to_one_engine_waits_for_a_place_there(small: AsyncScaleClient) -> None:
    pinned = [small.generate("hello", engine=1, **LONG) for _ in range(2 + 3)]
    waiting = asyncio.ensure_future(small.submit("hello", engine=1, **SHORT))
    await (await small.submit("hello", **SHORT))  # the other engine has room, and nobody stands in its way
    assert not waiting.done()
    for generation in pinned[1:]:
        generation.abort()
    await (await asyncio.wait_for(waiting, 10))
    pinned[0].abort()


async def test_a_place_that_is_given_up_is_passed_on_although_no_engine_says_anything(small: AsyncScaleClient) -> None:
    await small.collective_rpc("pause")
    held = [small.generate([1], **SHORT) for _ in range(3)]
    waiting = asyncio.ensure_future(small.submit("hello", **SHORT))
    await asyncio.sleep(0)
    held[1].abort()
    generation = await asyncio.wait_for(waiting, 10)
    await small.collective_rpc("resume")
    await asyncio.gather(held[0], held[2], generation)


async def test_a_timeout_covers_the_wait_for_a_place(small: AsyncScaleClient) -> None:
    running = await fill(small, 4)
    held = [small.generate([1], **LONG) for _ in range(3)]
    with pytest.raises(RequestTimeoutError):
        await small.submit("hello", timeout=0.05)
    assert len(small._dispatcher._admission) == 0
    for generation in [*running, *held]:
        generation.abort()


async def test_limits_are_each_clients_own(small: AsyncScaleClient) -> None:
    running = await fill(small, 4)
    held = [small.generate([1], **LONG) for _ in range(3)]
    async with AsyncScaleClient.attach(small.address, max_queued_requests=0) as other:
        share = [other.generate("hello", **SHORT) for _ in range(2)]  # its share of each engine: one
        with pytest.raises(OverloadedError):
            other.generate("hello", **SHORT)
        for generation in [*running, *held]:
            generation.abort()
        await asyncio.gather(*share)


async def test_ten_times_the_capacity_is_refused_clearly_and_the_rest_is_served() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2, max_num_seqs=4, max_queued_requests=8) as client:
        accepted, refused = [], 0
        for _ in range(60):
            for _ in range(20):
                try:
                    accepted.append(client.generate("hello", **SHORT))
                except OverloadedError:
                    refused += 1
            assert client._dispatcher.num_live <= 8 + 8
            await next(generation for generation in accepted if not generation.done)
        completions = await asyncio.gather(*accepted)
        assert refused > 5 * len(accepted)
        assert all(len(completion.token_ids) == 20 for completion in completions)
        await assert_idle(client)


@pytest.mark.parametrize("wrong", [-1, 1.5, "many", True])
def test_wrong_limits_raise_when_the_client_is_made(wrong: Any) -> None:
    with pytest.raises(ValueError, match="max_queued_requests"):
        AsyncScaleClient(MODEL, max_queued_requests=wrong)
    with pytest.raises(ValueError, match="max_queued_tokens"):
        AsyncScaleClient.attach("ipc:///tmp/x", max_queued_tokens=wrong)


# --- timeouts, in every state


async def test_a_timeout_while_held_back(small: AsyncScaleClient) -> None:
    running = await fill(small, 4)
    with pytest.raises(RequestTimeoutError):
        await small.generate("hello", timeout=0.05)
    assert len(small._dispatcher._held) == 0
    for generation in running:
        generation.abort()


async def test_a_timeout_in_the_engines_own_queue(small: AsyncScaleClient) -> None:
    running = [small.generate("long", engine=0, **LONG) for _ in range(2)]
    with pytest.raises(RequestTimeoutError):
        await small.generate("hello", engine=0, timeout=0.05)
    for generation in running:
        generation.abort()


async def test_a_timeout_in_prefill_between_tokens_and_at_a_paused_engine() -> None:
    slow = SimulatedModel(base_ms=20, prefill_us=100)
    async with AsyncScaleClient(slow, num_engines=1, max_num_batched_tokens=64) as client:
        with pytest.raises(RequestTimeoutError):
            await client.generate([7] * 4000, timeout=0.1)  # in chunks of 64, each in 26 ms
        with pytest.raises(RequestTimeoutError):
            await client.generate("hello", timeout=0.1, **LONG)
        await client.collective_rpc("pause")
        with pytest.raises(RequestTimeoutError):
            await client.generate("hello", timeout=0.05)
        with pytest.raises(RequestTimeoutError):
            await client.generate("hello", engine=0, timeout=0.05)
        await assert_idle(client)


async def test_a_timeout_while_the_only_engine_is_started_again() -> None:
    slow = SimulatedModel(base_ms=0.5, load_s=1.0)
    async with AsyncScaleClient(slow, num_engines=1) as client:
        generations = [client.generate("hello", engine=engine, timeout=1.0, **LONG) for engine in (None, 0)]
        kill(client, 0)
        for generation in generations:
            with pytest.raises(RequestTimeoutError):
                await generation
        async with asyncio.timeout(10):
            async for loads in client.watch_loads():
                if loads:
                    break
        await assert_idle(client)


async def test_what_expires_while_its_engine_is_out_takes_no_memory_and_no_place() -> None:
    slow = SimulatedModel(base_ms=0.5, load_s=1.0)
    async with AsyncScaleClient(slow, num_engines=2, max_num_seqs=2, max_queued_requests=3) as client:
        kill(client, 0)
        async with asyncio.timeout(10):
            async for loads in client.watch_loads():
                if len(loads) == 1:
                    break
        for _ in range(2):
            expiring = [client.generate("hello", engine=0, timeout=0.05) for _ in range(3)]
            with pytest.raises(OverloadedError, match="3 requests of this client wait at engine 0"):
                client.generate("hello", engine=0)
            for generation in expiring:
                with pytest.raises(RequestTimeoutError):
                    await generation
            assert not client._dispatcher._stranded[0]
        waiting = [client.generate("hello", engine=0, **SHORT) for _ in range(3)]
        assert {done.timing.engine for done in await asyncio.gather(*waiting)} == {0}
        await assert_idle(client)


async def test_a_timeout_of_a_request_that_was_moved() -> None:
    """It counts from the call, not from the move; and what the request has on its second engine is free."""
    async with AsyncScaleClient(MODEL, num_engines=2, max_restarts=0) as client:
        generations = [client.generate("long", timeout=1.0, **LONG) for _ in range(4)]
        await until_running(client, 4)
        kill(client, 0)
        for generation in generations:
            with pytest.raises(RequestTimeoutError):
                await generation
        assert sorted(generation._stream.num_moves for generation in generations) == [0, 0, 1, 1]
        await assert_idle(client)


async def test_who_waits_for_an_engine_that_will_not_return_is_told() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2, max_num_seqs=1, max_queued_requests=1, max_restarts=0) as client:
        running = [client.generate("long", engine=0, **LONG) for _ in range(2)]
        waiting = asyncio.ensure_future(client.submit("hello", engine=0, **SHORT))
        await until_running(client, 1)
        kill(client, 0)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(waiting, 20)
        for generation in running:
            with pytest.raises(EngineDeadError):
                await generation
        await (await client.submit("hello", **SHORT))


# --- closing under load


async def test_a_drain_finishes_what_is_held_and_refuses_who_waits_for_a_place() -> None:
    client = await AsyncScaleClient(MODEL, num_engines=1, max_num_seqs=4, max_queued_requests=3).start()
    running = [client.generate("hello", max_tokens=200, ignore_eos=True) for _ in range(4)]
    held = [client.generate([1], **SHORT) for _ in range(3)]
    waiting = asyncio.ensure_future(client.submit("hello"))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(client.close(drain=True))
    await asyncio.sleep(0)
    with pytest.raises(ClientClosedError):
        client.generate("late")
    with pytest.raises(ClientClosedError):
        await waiting
    assert [len(done.token_ids) for done in await asyncio.gather(*running, *held)] == [200] * 4 + [20] * 3
    await closing


async def test_a_second_close_without_drain_ends_the_drain(caplog: pytest.LogCaptureFixture) -> None:
    client = await AsyncScaleClient(MODEL, num_engines=1).start()
    generation = client.generate("hello", **LONG)
    closing = asyncio.ensure_future(client.close(drain=True))
    await asyncio.sleep(0.01)
    assert not closing.done()
    await client.close(drain=False)
    await closing
    with pytest.raises(ClientClosedError):
        await generation
    assert "did not finish" not in caplog.text


async def test_a_close_without_drain_ends_those_who_wait_for_a_place_and_all_others() -> None:
    client = await AsyncScaleClient(MODEL, num_engines=1, max_num_seqs=1, max_queued_requests=1).start()
    generations = [client.generate("long", **LONG) for _ in range(2)]
    waiting = [asyncio.ensure_future(client.submit("hello")) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.gather(*(client.close(drain=False) for _ in range(3)))
    for ended in (*generations, *waiting):
        with pytest.raises(ClientClosedError):
            await ended
    await client.close(drain=True)


async def test_a_drain_of_paused_engines_is_bounded_and_an_impatient_close_ends_it() -> None:
    for impatient in (False, True):
        client = await AsyncScaleClient(MODEL, num_engines=1, max_num_seqs=1).start()
        await client.collective_rpc("pause")
        generations = [client.generate("hello", engine=engine, **SHORT) for engine in (None, 0)]
        closing = asyncio.ensure_future(client.close(drain=True, timeout=None if impatient else 0.1))
        if impatient:
            await asyncio.sleep(0)
            assert not closing.done()
            await client.close(drain=False)
        await asyncio.wait_for(closing, 20)
        for generation in generations:
            with pytest.raises(ClientClosedError):
                await generation
