"""Engines that die or hang while requests are aboard: real processes, real signals, nothing lost."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from asyncscale import (
    AsyncScaleClient,
    ClientClosedError,
    Completion,
    EngineDeadError,
    EngineError,
    Generation,
    SimulatedModel,
)
from asyncscale.client.engine_process import EngineProcess
from asyncscale.config import Fault

# Token ids of a prompt, and what they do to the engine that computes it.
FAULTS: dict[int, Fault] = {300: "error", 301: "raise", 302: "exit", 303: "kill", 304: "segfault", 305: "hang"}
TOKEN_OF = {fault: token_id for token_id, fault in FAULTS.items()}
MODEL = SimulatedModel(base_ms=0.5, decode_us=1, prefill_us=0.1, faults=FAULTS)
LONG: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 3},
    {"seed": 4, "n": 3},
    {"seed": 5, "logprobs": 2, "prompt_logprobs": 1},
    {"seed": 6, "stop": " w1"},
    {"seed": 7, "min_tokens": 90, "stop_token_ids": [5000, 5001]},
    {"seed": 8, "presence_penalty": 0.5, "repetition_penalty": 1.1},
]


def engines_of(client: AsyncScaleClient) -> dict[int, EngineProcess]:
    engines: dict[int, EngineProcess] = client._engines.supervisor.engines  # type: ignore[attr-defined]
    return engines


def send(client: AsyncScaleClient, engine_id: int, number: int) -> None:
    pid = engines_of(client)[engine_id].pid
    assert pid is not None
    os.kill(pid, number)


async def reach(client: AsyncScaleClient, in_flight: int) -> None:
    """Wait until the engines themselves report so many requests."""
    async with asyncio.timeout(20):
        async for loads in client.watch_loads():
            if sum(load.running + load.waiting for load in loads) == in_flight:
                return


async def until(client: AsyncScaleClient, condition: Callable[[], bool], timeout: float = 20) -> None:
    """Engines that come and go change the loads; nothing else needs to."""
    async with asyncio.timeout(timeout):
        while not condition():
            await client._dispatcher.wait_load_change()


async def restarted(client: AsyncScaleClient, engine_id: int, times: int = 1) -> None:
    await until(client, lambda: health(client)[engine_id] == ("ready", times))


async def being_restarted(client: AsyncScaleClient) -> None:
    """Wait until there is a second process for engine 0; no event tells of that."""
    async with asyncio.timeout(10):
        while 0 not in engines_of(client) or engines_of(client)[0].spec.incarnation == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def health(client: AsyncScaleClient) -> list[tuple[str, int]]:
    return [(engine.state, engine.restarts) for engine in client.health()]


async def assert_idle(client: AsyncScaleClient) -> None:
    """Every engine's own counts, and this client's, are back at zero, and every KV block is free."""
    await reach(client, 0)
    for stats in await client.collective_rpc("kv_cache_stats"):
        assert stats["free_blocks"] == stats["num_blocks"]
    assert all(load.mine == 0 for load in client.engine_loads())


def ask(client: AsyncScaleClient, times: int = 3) -> list[Generation]:
    """Requests of every kind, several of each."""
    options = [{"max_tokens": 200, "ignore_eos": True, **kind} for kind in KINDS for _ in range(times)]
    return [client.generate(f"prompt {i}", **option) for i, option in enumerate(options)]


@pytest.fixture(scope="module")
def undisturbed() -> list[Completion]:
    """What `ask` gives on engines that live."""

    async def run() -> list[Completion]:
        async with AsyncScaleClient(MODEL, num_engines=1) as client:
            return list(await asyncio.gather(*ask(client)))

    return asyncio.run(run())


def assert_same(ended: list[Completion], undisturbed: list[Completion]) -> None:
    for after, before in zip(ended, undisturbed, strict=True):
        assert after.choices == before.choices
        assert after.prompt_logprobs == before.prompt_logprobs


async def read(generation: Generation, at: int, act: Callable[[], None]) -> list[tuple[int, int, int]]:
    """Read it token by token, and do something when so many have come. Returns (choice, index, token id) of each."""
    seen = []
    async for token in generation:
        seen.append((token.choice, token.index, token.token_id))
        if len(seen) == at:
            act()
    return seen


@pytest.fixture
async def client() -> AsyncIterator[AsyncScaleClient]:
    async with AsyncScaleClient(MODEL, num_engines=2, hang_timeout=0.5) as client:
        yield client
        await assert_idle(client)


# --- deaths


@pytest.mark.parametrize("death", ["kill", "segfault", "raise", "exit", "hang", "SIGKILL", "SIGSEGV", "SIGSTOP"])
async def test_requests_go_on_token_for_token_and_the_engine_comes_back(
    client: AsyncScaleClient, undisturbed: list[Completion], death: str
) -> None:
    def die() -> None:
        if death.startswith("SIG"):
            send(client, 0, signal.Signals[death])
        else:
            poison.append(client.generate([TOKEN_OF[death]], engine=0, max_tokens=5))  # type: ignore[index]

    poison: list[Generation] = []
    generations = ask(client)
    seen = await read(generations[0], 40, die)
    ended = list(await asyncio.gather(*generations))
    assert_same(ended, undisturbed)
    assert [index for _, index, _ in seen] == list(range(len(seen)))  # none twice, none missing
    assert [token_id for _, _, token_id in seen] == undisturbed[0].token_ids
    assert 0 < sum(completion.timing.num_moves for completion in ended) <= len(ended)
    for generation in poison:  # it is tried a second time, and then no more
        with pytest.raises(EngineDeadError):
            await generation
    await restarted(client, 0, 2 if poison else 1)
    assert str(client.health()[0].last_error).startswith("engine 0 died (")
    assert client.health()[1].last_error is None
    assert (await client.generate("x", engine=0, max_tokens=3, ignore_eos=True)).timing.engine == 0


async def test_an_attached_client_sees_the_same(client: AsyncScaleClient, undisturbed: list[Completion]) -> None:
    async with AsyncScaleClient.attach(client.address) as attached:
        generations = ask(attached)
        await read(generations[0], 40, lambda: send(client, 1, signal.SIGKILL))
        ended = list(await asyncio.gather(*generations))
        assert_same(ended, undisturbed)
        assert sum(completion.timing.num_moves for completion in ended) > 0
        await restarted(attached, 1)
        assert attached.health()[1].last_error == "engine 1 died (killed by SIGKILL)"
        assert (await attached.generate("x", engine=1, max_tokens=3, ignore_eos=True)).timing.engine == 1


async def test_all_engines_at_once(client: AsyncScaleClient, undisturbed: list[Completion]) -> None:
    def kill_both() -> None:
        for engine_id in (0, 1):
            send(client, engine_id, signal.SIGKILL)

    generations = ask(client)
    await read(generations[0], 40, kill_both)
    assert_same(list(await asyncio.gather(*generations)), undisturbed)
    await restarted(client, 0)
    await restarted(client, 1)


async def test_bursts_that_were_delivered_but_not_read_are_kept(
    client: AsyncScaleClient, undisturbed: list[Completion]
) -> None:
    """The engine dies while the client's loop is blocked: what is in the socket is taken, what is not is made anew."""

    def block_and_kill() -> None:
        engines = engines_of(client)
        time.sleep(0.02)  # not for a condition: engines go on and their tokens pile up
        for engine_id in engines:
            send(client, engine_id, signal.SIGKILL)
        time.sleep(0.02)

    generations = ask(client)
    await read(generations[0], 40, block_and_kill)
    assert_same(list(await asyncio.gather(*generations)), undisturbed)


async def test_requests_wait_for_the_only_engine_and_new_ones_too(undisturbed: list[Completion]) -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        generations = ask(client)
        await read(generations[0], 40, lambda: send(client, 0, signal.SIGKILL))
        await until(client, lambda: health(client) != [("ready", 0)])
        later = client.generate("later", max_tokens=3, ignore_eos=True)
        pinned = client.generate("pinned", engine=0, max_tokens=3, ignore_eos=True)
        assert_same(list(await asyncio.gather(*generations)), undisturbed)
        assert [len((await generation).token_ids) for generation in (later, pinned)] == [3, 3]
        await assert_idle(client)


async def test_requests_wait_for_a_restart_no_longer_than_restart_timeout() -> None:
    slow = SimulatedModel(base_ms=0.5, load_s=1.0)
    async with AsyncScaleClient(slow, num_engines=1, restart_timeout=0.2) as client:
        generations = [client.generate("hello", engine=engine, **LONG) for engine in (None, 0)]
        await reach(client, 2)
        send(client, 0, signal.SIGKILL)
        for generation in generations:
            with pytest.raises(EngineDeadError, match="not back within") as caught:
                await generation
            assert (caught.value.engine_id, caught.value.exit_code) == (0, -signal.SIGKILL)
        for engine in (None, 0):
            with pytest.raises(EngineDeadError):
                client.generate("later", engine=engine)
        assert health(client) == [("restarting", 0)]


async def test_the_error_carries_the_end_of_stderr_for_attached_clients_too() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, max_restarts=0) as owner, attached_to(owner) as attached:
        for client in (owner, attached):
            with pytest.raises(EngineDeadError, match="asked the simulated model for an exception") as caught:
                await client.generate([TOKEN_OF["raise"]])
            assert caught.value.exit_code == 1
            assert "Traceback" in caught.value.stderr_tail
        assert attached.health() == owner.health()


@pytest.mark.parametrize("who", ["owner", "attached"])
async def test_a_restart_storm_ends_with_its_cause(who: str) -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, max_restarts=2) as owner, attached_to(owner) as attached:
        client = owner if who == "owner" else attached
        for death in range(3):
            await restarted(owner, 0, death)
            send(owner, 0, signal.SIGKILL)
            await until(owner, lambda death=death: health(owner) != [("ready", death)])  # type: ignore[misc]
        await until(client, lambda: health(client) == [("dead", 2)])
        with pytest.raises(EngineDeadError, match=r"killed by SIGKILL.*given up after 2 restarts"):
            client.generate("hello")


def attached_to(owner: AsyncScaleClient) -> AsyncScaleClient:
    return AsyncScaleClient.attach(owner.address)


async def test_an_engine_that_dies_while_it_is_started_again_is_started_once_more() -> None:
    slow = SimulatedModel(base_ms=0.5, load_s=0.5)
    async with AsyncScaleClient(slow, num_engines=1) as client:
        generation = client.generate("hello", max_tokens=10, ignore_eos=True)
        send(client, 0, signal.SIGKILL)
        await being_restarted(client)
        send(client, 0, signal.SIGKILL)
        assert len((await generation).token_ids) == 10
        assert health(client) == [("ready", 2)]
        assert "did not start" in str(client.health()[0].last_error)


async def test_one_that_is_stopped_while_it_is_started_again_is_replaced() -> None:
    slow = SimulatedModel(base_ms=0.5, load_s=0.3)
    async with AsyncScaleClient(slow, num_engines=1, hang_timeout=0.5) as client:
        generation = client.generate("hello", max_tokens=10, ignore_eos=True)
        send(client, 0, signal.SIGKILL)
        await being_restarted(client)
        send(client, 0, signal.SIGSTOP)
        assert len((await generation).token_ids) == 10
        assert health(client) == [("ready", 2)]


async def test_a_request_that_is_aboard_at_two_deaths_fails_alone() -> None:
    async with AsyncScaleClient(MODEL, num_engines=3) as client:
        generation = client.generate("hello", request_id="unlucky", **LONG)
        for _ in range(2):
            await reach(client, 1)
            (engine,) = (load.engine_id for load in client.engine_loads() if load.mine)
            bystander = client.generate("x", engine=(engine + 1) % 3, max_tokens=300, ignore_eos=True)
            send(client, engine, signal.SIGKILL)
            await until(client, lambda engine=engine: health(client)[engine] == ("ready", 1))  # type: ignore[misc]
            assert len((await bystander).token_ids) == 300
        with pytest.raises(EngineDeadError, match="'unlucky' was aboard two engines that died"):
            await generation
        assert len((await client.generate("next", max_tokens=3, ignore_eos=True)).token_ids) == 3
        await assert_idle(client)


async def test_an_error_that_one_request_causes_fails_that_request_only(client: AsyncScaleClient) -> None:
    others = [client.generate("hello", max_tokens=100, ignore_eos=True) for _ in range(8)]
    await reach(client, 8)
    for _ in range(3):
        with pytest.raises(EngineError, match="asked the simulated model for an error") as caught:
            await client.generate([TOKEN_OF["error"]])
        assert not isinstance(caught.value, EngineDeadError)
    assert [len(completion.token_ids) for completion in await asyncio.gather(*others)] == [100] * 8
    assert health(client) == [("ready", 0)] * 2


# --- hangs


@pytest.mark.parametrize("who", ["owner", "attached"])
async def test_an_idle_engine_that_is_stopped_is_replaced(client: AsyncScaleClient, who: str) -> None:
    async with attached_to(client) as attached:
        asking = client if who == "owner" else attached
        send(client, 0, signal.SIGSTOP)
        completion = await asking.generate("hello", engine=0, max_tokens=5, ignore_eos=True)
        assert len(completion.token_ids) == 5
        assert health(client)[0] == ("ready", 1)


async def test_a_busy_engine_is_never_mistaken_for_one_that_hangs() -> None:
    """Steps of a second and more, in a fleet where half of that would be a hang."""
    slow = SimulatedModel(base_ms=1500, prefill_us=5000)
    async with AsyncScaleClient(slow, num_engines=1, hang_timeout=0.5) as client:
        completion = await client.generate(list(range(300, 500)), max_tokens=2, ignore_eos=True)
        assert len(completion.token_ids) == 2
        assert health(client) == [("ready", 0)]
        age = client.health()[0].last_step_age
        assert age is not None
        assert age < 10


async def test_nobody_minds_a_stopped_engine_without_hang_timeout() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, hang_timeout=None) as client:
        generation = client.generate("hello", max_tokens=50, ignore_eos=True)
        send(client, 0, signal.SIGSTOP)
        assert client._engines.supervisor._looking is None  # type: ignore[attr-defined]
        send(client, 0, signal.SIGCONT)
        assert len((await generation).token_ids) == 50
        assert health(client) == [("ready", 0)]


# --- what an engine that comes later must know


async def test_an_engine_that_is_started_again_is_as_paused_as_the_others(client: AsyncScaleClient) -> None:
    await client.collective_rpc("pause")
    send(client, 0, signal.SIGKILL)
    await restarted(client, 0)
    generation = client.generate("hello", max_tokens=5, ignore_eos=True)
    await until(client, lambda: not any(load.accepting for load in client.engine_loads()))
    assert not generation.done
    await client.collective_rpc("resume")
    assert len((await generation).token_ids) == 5


async def test_closing_while_an_engine_is_started_again_leaves_nothing() -> None:
    slow = SimulatedModel(base_ms=0.5, load_s=1.0)
    client = await AsyncScaleClient(slow, num_engines=2, start_timeout=20).start()
    generation = client.generate("hello", **LONG)
    send(client, 0, signal.SIGKILL)
    send(client, 1, signal.SIGKILL)
    await until(client, lambda: health(client) == [("restarting", 0)] * 2)
    await client.close(drain=False)
    with pytest.raises(ClientClosedError):
        await generation
