"""Faults and waits, on real engines; with the fixtures of the plugin itself."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest

from asyncscale import AsyncScaleClient, SimulatedModel
from asyncscale.client.child_process import activity
from asyncscale.testing import (
    cut_client,
    hang_engine,
    kill_engine,
    resume_engine,
    slow_engine,
    wait_engines_ready,
    wait_idle,
    wait_until,
)
from asyncscale.testing.settings import Settings
from asyncscale.testing.shared import EnginePool

MakeClient = Callable[..., Awaitable[AsyncScaleClient]]
MODEL = SimulatedModel(base_ms=2.0)


async def halfway(client: AsyncScaleClient, engine: int | None = None) -> tuple[object, list[int]]:
    """The stream of a request that has begun, and its first tokens."""
    stream = aiter(client.generate("x", max_tokens=60, ignore_eos=True, temperature=0, engine=engine))
    return stream, [(await anext(stream)).token_id for _ in range(5)]


async def whole(client: AsyncScaleClient) -> list[int]:
    return (await client.generate("x", max_tokens=60, ignore_eos=True, temperature=0)).token_ids


async def test_who_kills_an_engine_goes_on_when_the_client_knows(asyncscale_client_factory: MakeClient) -> None:
    client = await asyncscale_client_factory(MODEL, num_engines=2)
    stream, token_ids = await halfway(client, engine=0)
    pid = client.health()[0].pid
    await kill_engine(client, 0)
    assert [engine.state for engine in client.health()] == ["restarting", "ready"]
    token_ids += [token.token_id async for token in stream]  # type: ignore[attr-defined]
    await wait_engines_ready(client)
    assert (client.health()[0].restarts, client.health()[0].pid != pid) == (1, True)
    assert token_ids == await whole(client)


async def test_an_engine_that_hangs_does_nothing_until_it_is_resumed(asyncscale_client_factory: MakeClient) -> None:
    client = await asyncscale_client_factory(MODEL, hang_timeout=None)
    stream, token_ids = await halfway(client)
    await hang_engine(client, 0)
    (engine,) = client.health()
    assert engine.pid is not None
    assert activity(engine.pid)[0] == "T"
    await resume_engine(client, 0)
    token_ids += [token.token_id async for token in stream]  # type: ignore[attr-defined]
    assert token_ids == await whole(client)
    assert (client.health()[0].pid, client.health()[0].restarts) == (engine.pid, 0)


async def test_a_slow_engine_works_and_is_fast_again(asyncscale_client_factory: MakeClient) -> None:
    client = await asyncscale_client_factory(MODEL)
    (engine,) = client.health()
    assert engine.pid is not None
    async with slow_engine(client, 0, factor=10):
        await wait_until(lambda: activity(engine.pid)[0] == "T", "it is stopped now and then")
        token_ids = await whole(client)
    assert token_ids == await whole(client)
    assert activity(engine.pid)[0] != "T"
    async with slow_engine(client, 0):
        os.kill(engine.pid, signal.SIGKILL)
        await wait_until(lambda: client.health()[0].restarts == 1)
    with pytest.raises(ValueError, match=r"factor must be at least 1, got 0\.5"):
        async with slow_engine(client, 0, factor=0.5):
            pass


async def test_a_client_that_was_cut_off_has_every_token_once(asyncscale_client_factory: MakeClient) -> None:
    client = await asyncscale_client_factory(MODEL, num_engines=2)
    async with AsyncScaleClient.attach(client.address) as attached:
        stream, token_ids = await halfway(attached)
        untouched = client._dispatcher.connections
        await cut_client(attached)
        token_ids += [token.token_id async for token in stream]  # type: ignore[attr-defined]
        assert token_ids == await whole(attached)
    assert client._dispatcher.connections == untouched
    assert [engine.restarts for engine in client.health()] == [0, 0]


async def test_faults_reach_engines_by_whatever_knows_how_they_are(asyncscale_engines: AsyncScaleClient) -> None:
    await kill_engine(asyncscale_engines, 0)
    await wait_engines_ready(asyncscale_engines)
    assert asyncscale_engines.health()[0].restarts >= 1
    with pytest.raises(ValueError, match="there is no engine 7: the engines are 0"):
        await kill_engine(asyncscale_engines, 7)


async def test_waits_say_what_did_not_come_true(asyncscale_client: AsyncScaleClient) -> None:
    generation = asyncscale_client.generate("x", max_tokens=8000, ignore_eos=True)
    with pytest.raises(TimeoutError, match=r"waited 0\.02 s, and .* the engines are idle: .* are 1 at engine 0"):
        await wait_idle(asyncscale_client, timeout=0.02)
    generation.abort()
    await wait_idle(asyncscale_client)
    with pytest.raises(TimeoutError, match="it is still not so that pigs fly"):
        await wait_until(lambda: False, "pigs fly", timeout=0.02)
    os.kill(asyncscale_client.health()[0].pid or 0, signal.SIGKILL)
    await wait_until(lambda: asyncscale_client.health()[0].state != "ready")
    with pytest.raises(TimeoutError, match=r"engine 0 is restarting \(engine 0 died \(killed by SIGKILL\)\)"):
        await wait_engines_ready(asyncscale_client, timeout=0)


@pytest.mark.parametrize("_", range(2))
async def test_prompts_of_earlier_tests_are_not_cached(asyncscale_client: AsyncScaleClient, _: int) -> None:
    cached = [(await asyncscale_client.generate("x" * 64, max_tokens=1)).timing.num_cached_tokens for _ in range(2)]
    assert cached == [0, 48]


answers: set[str] = set()


@pytest.mark.parametrize("_", range(2))
async def test_who_draws_no_seed_is_answered_alike_in_each_test(asyncscale_client: AsyncScaleClient, _: int) -> None:
    texts = [(await asyncscale_client.generate("x", max_tokens=4, temperature=1)).text for _ in range(2)]
    answers.update(texts)
    assert len(answers) == 2


async def test_other_processes_are_told_the_address_and_nothing_else(asyncscale_engines: str) -> None:
    copied = pickle.loads(pickle.dumps(asyncscale_engines))
    assert (type(copied), copied) == (str, str(asyncscale_engines))


async def test_a_condition_may_be_a_coroutine_function() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, event.set)

    async def is_set() -> bool:
        return event.is_set()

    await wait_until(is_set)


@pytest.fixture
def pool() -> Iterator[EnginePool]:
    pool = EnginePool()
    yield pool
    pool.close()


def settings(max_num_seqs: int) -> Settings:
    return Settings({"max_num_seqs": max_num_seqs})


def test_engines_that_were_used_least_recently_make_room_unless_somebody_holds_them(pool: EnginePool) -> None:
    with pool.hold(settings(1)) as held:
        first = [pool.acquire(settings(number)) for number in (2, 3)]
        assert pool.acquire(settings(2)) == first[0]
        pool.acquire(settings(4))
        assert pool.acquire(settings(2)) == first[0]
        assert pool.acquire(settings(3)) != first[1]
        assert pool.acquire(settings(1)) == held


def test_who_does_not_wait_for_the_start_leaves_it_to_the_next(pool: EnginePool) -> None:
    slow = Settings({"model": SimulatedModel(load_s=1.0)})
    ctrl_c = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    ctrl_c.start()
    with pytest.raises(KeyboardInterrupt):
        pool.acquire(slow)
    ctrl_c.join()
    (starting,) = pool._sets
    assert not starting.starting.done()
    address = pool.acquire(slow)
    assert pool._sets == [starting]
    assert address.health()[0].state == "ready"


def test_engines_that_cannot_start_are_tried_again(pool: EnginePool) -> None:
    broken = Settings({"model": "/nonexistent"})
    for _ in range(2):
        with pytest.raises(Exception, match="/nonexistent"):
            pool.acquire(broken)
