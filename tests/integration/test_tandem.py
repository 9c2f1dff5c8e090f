"""Engines in tandem, as real processes: they start and pause together whatever is sent, called, killed or closed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import msgspec
import psutil
import pytest
import zmq
from waves_at_fault import run_out_of_step

from asyncscale import (
    AsyncScaleClient,
    ClientClosedError,
    Completion,
    EngineDeadError,
    Generation,
    SimulatedModel,
    messages,
)
from asyncscale.client import supervisor as supervisor_module
from asyncscale.client.coordinator import Coordinator
from asyncscale.client.engine_process import EngineProcess
from asyncscale.client.tandem_hub import TandemHub
from asyncscale.tandem.messages import GroupState, Paused, Wake
from asyncscale.testing.faults import hang_engine, kill_engine
from asyncscale.testing.waiting import wait_engines_ready, wait_until

HANG_TOKEN = 305
ALONE = SimulatedModel(base_ms=0.5, decode_us=1, prefill_us=0.1, faults={HANG_TOKEN: "hang"})
TANDEM = msgspec.structs.replace(ALONE, lockstep=True)
LONG: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True}


@pytest.fixture
async def client() -> AsyncIterator[AsyncScaleClient]:
    async with AsyncScaleClient(TANDEM, num_engines=2, hang_timeout=0.5) as client:
        yield client
        await assert_paused_and_free(client)


def attached_to(owner: AsyncScaleClient) -> AsyncScaleClient:
    return AsyncScaleClient.attach(owner.address)


def hub_of(owner: AsyncScaleClient) -> TandemHub:
    hub: TandemHub | None = owner._engines._tandem  # type: ignore[attr-defined]
    assert hub is not None
    return hub


async def paused(owner: AsyncScaleClient) -> None:
    """Wait until all engines pause, and nobody has work."""
    await wait_until(lambda: hub_of(owner)._waves.idle, "the engines pause")


async def stepping(owner: AsyncScaleClient) -> None:
    await wait_until(lambda: hub_of(owner).state.running, "the engines step")


async def positions(client: AsyncScaleClient, **options: Any) -> list[tuple[int, int, int]]:
    """Of each engine: generation, wave, and how many of its steps are done."""
    stats = await client.collective_rpc("tandem_stats", **options)
    return [(each["generation"], each["wave"], each["num_steps"]) for each in stats]


async def assert_paused_and_free(owner: AsyncScaleClient) -> None:
    """Nobody steps, nothing is left of any request, and all are in the same place."""
    async with asyncio.timeout(10):
        async for loads in owner.watch_loads():
            if all(load.mine == load.running == load.waiting == 0 for load in loads):
                break
    await paused(owner)
    for stats in await owner.collective_rpc("kv_cache_stats"):
        assert stats["free_blocks"] == stats["num_blocks"]
    assert len({(generation, wave) for generation, wave, _ in await positions(owner)}) == 1


def restarts(client: AsyncScaleClient) -> list[int]:
    return [engine.restarts for engine in client.health()]


# --- requests


def ask(*clients: AsyncScaleClient, engine: int | None = None) -> list[Generation]:
    """Requests of several kinds and lengths, of the clients in turn."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 3},
        {"seed": 4, "n": 3, "logprobs": 1},
        {"seed": 5, "stop": " w1"},
        {"seed": 6, "max_tokens": 1},
        {"seed": 7, "presence_penalty": 0.5},
    ]
    return [
        clients[i % len(clients)].generate(
            f"prompt {i}", engine=engine, **{"max_tokens": 150, "ignore_eos": True, **kind}
        )
        for i, kind in enumerate(2 * kinds)
    ]


@pytest.fixture(scope="module")
def undisturbed() -> list[Completion]:
    """What `ask` gives of an engine that steps on its own."""

    async def run() -> list[Completion]:
        async with AsyncScaleClient(ALONE, num_engines=1) as client:
            return list(await asyncio.gather(*ask(client)))

    return asyncio.run(run())


async def assert_same(generations: list[Generation], undisturbed: list[Completion]) -> None:
    for after, before in zip(await asyncio.gather(*generations), undisturbed, strict=True):
        assert after.choices == before.choices


@pytest.mark.parametrize("num_engines", [2, 4])
async def test_tokens_are_those_of_engines_that_step_alone(num_engines: int, undisturbed: list[Completion]) -> None:
    async with AsyncScaleClient(TANDEM, num_engines=num_engines) as owner, attached_to(owner) as attached:
        await assert_same(ask(owner, attached), undisturbed)
        await assert_same(ask(owner, attached, engine=num_engines - 1), undisturbed)
        before = hub_of(owner).state.wave
        for _ in range(10):  # one after the other
            assert len((await owner.generate("hello", max_tokens=2, ignore_eos=True)).token_ids) == 2
        await assert_paused_and_free(owner)
        assert hub_of(owner).state.wave > before
        assert hub_of(owner).state.generation == 1


async def test_requests_that_cross_pauses_are_served(client: AsyncScaleClient) -> None:
    """Short ones with gaps about as long as a wave, so that each may come before, at, or after its end."""

    async def send(sender: AsyncScaleClient, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            count = rng.randrange(1, 4)
            completion = await sender.generate(
                "hello", max_tokens=count, ignore_eos=True, engine=rng.choice([None, 0, 1])
            )
            assert len(completion.token_ids) == count
            await asyncio.sleep(rng.choice([0, 0, rng.random() * 0.01]))

    async with attached_to(client) as first, attached_to(client) as second, asyncio.timeout(30):
        await asyncio.gather(send(client, 1), send(first, 2), send(second, 3))
    assert hub_of(client).state.wave > 10  # there were pauses to cross
    assert restarts(client) == [0, 0]


async def test_idle_engines_block(client: AsyncScaleClient) -> None:
    await asyncio.gather(*(client.generate("hello", engine=engine, max_tokens=9) for engine in (0, 1)))
    await paused(client)
    before = await positions(client)
    engines = [psutil.Process(engine.pid) for engine in client.health()]
    used = [sum(engine.cpu_times()[:2]) for engine in engines]
    await asyncio.sleep(1)
    # Two of the clock's ticks: the answer to the call above is among it.
    assert all(sum(engine.cpu_times()[:2]) - start <= 0.02 for engine, start in zip(engines, used, strict=True))
    assert await positions(client) == before


# --- deaths


async def test_the_group_is_formed_anew_once_for_each_death(undisturbed: list[Completion]) -> None:
    """In a wave, in a pause, while another engine joins, two at once: requests go on token for token."""
    async with AsyncScaleClient(TANDEM, num_engines=4) as owner, attached_to(owner) as attached:
        generations = ask(owner, attached)
        await stepping(owner)
        await kill_engine(owner, 1)
        await assert_same(generations, undisturbed)
        await paused(owner)
        assert hub_of(owner).state.generation == 2

        await kill_engine(owner, 2)
        await assert_same(ask(owner, attached), undisturbed)
        await paused(owner)
        assert hub_of(owner).state.generation == 3

        generations = ask(owner, attached)
        await stepping(owner)
        await asyncio.gather(kill_engine(owner, 0), kill_engine(owner, 3))
        await assert_same(generations, undisturbed)
        await wait_engines_ready(owner)
        assert hub_of(owner).state.generation == 4
        assert restarts(owner) == [1, 1, 1, 1]
        await assert_paused_and_free(owner)


async def test_an_engine_dies_while_another_one_joins(undisturbed: list[Completion]) -> None:
    slow = msgspec.structs.replace(TANDEM, load_s=0.3)
    async with AsyncScaleClient(slow, num_engines=3) as owner, attached_to(owner) as attached:
        generations = ask(owner, attached)
        await stepping(owner)
        await kill_engine(owner, 2)
        await wait_until(lambda: 2 in processes(owner), "engine 2 is started again")
        await kill_engine(owner, 0)
        await assert_same(generations, undisturbed)
        await wait_engines_ready(owner)
        assert restarts(owner) == [1, 0, 1]
        await assert_paused_and_free(owner)


def processes(owner: AsyncScaleClient) -> dict[int, EngineProcess]:
    engines: dict[int, EngineProcess] = owner._engines.supervisor.engines  # type: ignore[attr-defined]
    return engines


@pytest.mark.parametrize("is_idle", [False, True])
async def test_who_waits_for_an_engine_that_is_stopped_does_not_hang(
    client: AsyncScaleClient, undisturbed: list[Completion], is_idle: bool
) -> None:
    generations = [] if is_idle else ask(client)
    if not is_idle:
        await stepping(client)
    await hang_engine(client, 0)
    await assert_same(generations or ask(client), undisturbed)
    await wait_engines_ready(client)
    assert restarts(client) == [1, 0]


async def test_who_waits_in_a_step_for_an_engine_that_hangs_does_not_hang(
    client: AsyncScaleClient, undisturbed: list[Completion]
) -> None:
    generations = ask(client, engine=1)
    poison = client.generate([HANG_TOKEN], engine=0, max_tokens=5)
    with pytest.raises(EngineDeadError, match="it hung"):  # at the second attempt
        await poison
    await assert_same(generations, undisturbed)
    await wait_engines_ready(client)
    assert restarts(client) == [2, 0]


async def test_without_one_of_its_engines_a_group_is_dead() -> None:
    async with AsyncScaleClient(TANDEM, num_engines=3, max_restarts=0) as owner, attached_to(owner) as attached:
        async with asyncio.timeout(20):
            generations = [
                client.generate("hello", engine=engine, **LONG)
                for client in (owner, attached)
                for engine in (None, 0, 1, 2)
            ]
            await stepping(owner)
            await kill_engine(owner, 1)
            for generation in generations:
                with pytest.raises(EngineDeadError):
                    await generation
            for client in (owner, attached):
                await wait_until(lambda client=client: client.health()[1].state == "dead")
                for engine in (None, 0, 1):
                    with pytest.raises(EngineDeadError, match="engine 1 died"):
                        client.generate("hello", engine=engine)
                for method in ("tandem_stats", "pause"):
                    with pytest.raises(EngineDeadError, match="engine 1 died"):
                        await client.collective_rpc(method, lockstep=True)
            assert [engine.state for engine in owner.health()] == ["ready", "dead", "ready"]


async def test_calls_that_wait_for_a_group_end_when_there_will_be_none() -> None:
    """They wait, as the waves cannot end: an engine is stopped, and nobody minds. Then it dies for good."""
    async with (
        AsyncScaleClient(TANDEM, num_engines=2, max_restarts=0, hang_timeout=None) as owner,
        attached_to(owner) as attached,
    ):
        generation = owner.generate("hello", **LONG)
        await stepping(owner)
        await hang_engine(owner, 1)
        calls = [
            asyncio.ensure_future(client.collective_rpc(method, lockstep=True))
            for client in (owner, attached)
            for method in ("tandem_stats", "pause", "process_info")
        ]
        await wait_until(lambda: hub_of(owner).state.held, "somebody waits for the engines to rest")
        await kill_engine(owner, 1)
        for waiting in [*calls, generation]:
            async with asyncio.timeout(10):
                with pytest.raises(EngineDeadError, match="engine 1 died"):
                    await waiting


async def test_waves_at_fault_end_all_requests_and_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "run_engine", run_out_of_step)
    async with AsyncScaleClient(TANDEM, num_engines=2) as owner, attached_to(owner) as attached:
        async with asyncio.timeout(20):
            generations = [client.generate("hello", **LONG) for client in (owner, attached) for _ in range(4)]
            for generation in generations:
                with pytest.raises(EngineDeadError, match="SteppedAloneError"):
                    await generation
            for client in (owner, attached):
                with pytest.raises(EngineDeadError, match="SteppedAloneError"):
                    client.generate("hello")
        assert restarts(owner) == [0, 0]
        assert not owner._engines.supervisor._timers  # type: ignore[attr-defined]


# --- calls in lockstep


async def test_calls_in_lockstep_are_between_the_same_two_steps(
    client: AsyncScaleClient, undisturbed: list[Completion]
) -> None:
    async with attached_to(client) as attached:
        generations = ask(client, attached)
        background = [client.generate("goes on", engine=engine, **LONG) for engine in (0, 1)]
        for _ in range(10):
            for caller in (client, attached):
                assert len(set(await positions(caller, lockstep=True))) == 1
        many = [positions(caller, lockstep=True) for caller in (client, attached) for _ in range(50)]
        seen = await asyncio.gather(*many, client.collective_rpc("kv_cache_stats"))
        assert all(len(set(places)) == 1 for places in seen[:-1])
        await assert_same(generations, undisturbed)
        for generation in background:
            assert not generation.done
            generation.abort()


async def test_engines_that_step_alone_do_not_step_in_a_lockstep_call() -> None:
    """A method that shows an engine's steps answers the same at the beginning and at the end of such a call."""
    async with AsyncScaleClient(ALONE, num_engines=2) as client:
        generations = [client.generate("hello", engine=engine, **LONG) for engine in (0, 1)]
        calls = client._engines._calls  # type: ignore[attr-defined]
        async with asyncio.timeout(20):
            async with calls._rest():
                first = await client.collective_rpc("kv_cache_stats")
                for _ in range(20):
                    assert await client.collective_rpc("kv_cache_stats") == first
            await wait_until(lambda: all(generation.num_tokens for generation in generations))
        for generation in generations:
            generation.abort()


@pytest.mark.parametrize("how", ["cancelled", "gone"])
async def test_a_caller_that_leaves_in_the_middle_of_its_call_holds_nobody(client: AsyncScaleClient, how: str) -> None:
    generation = client.generate("goes on", max_tokens=2000, ignore_eos=True)
    await stepping(client)
    if how == "cancelled":
        for _ in range(5):
            call = asyncio.ensure_future(client.collective_rpc("tandem_stats", lockstep=True))
            await wait_until(lambda: hub_of(client).state.held)
            call.cancel()
            await asyncio.wait([call])
    else:
        for peer in raw_peers(client.address, 5):
            peer.send(messages.encoder.encode(messages.Attach(messages.PROTOCOL_VERSION)))
            peer.send(messages.encoder.encode(messages.CollectiveCall(1, "tandem_stats", [], lockstep=True)))
            assert await asyncio.to_thread(peer.poll, 5000)  # it is welcome
            peer.close(linger=0)
    assert len((await generation).token_ids) == 2000
    assert len(set(await positions(client, lockstep=True))) == 1


async def test_a_call_in_lockstep_waits_until_the_group_is_whole(client: AsyncScaleClient) -> None:
    async with attached_to(client) as attached:
        generation = client.generate("goes on", engine=0, max_tokens=2000, ignore_eos=True)
        await stepping(client)
        await kill_engine(client, 1)
        seen = await asyncio.gather(*(positions(caller, lockstep=True) for caller in (client, attached)))
        for places in seen:
            assert len(places) == 2
            assert len(set(places)) == 1
            assert places[0][0] == 2
        assert len((await generation).token_ids) == 2000


# --- pause


@pytest.mark.parametrize("lockstep", [False, True])
async def test_nothing_moves_in_a_pause(
    client: AsyncScaleClient, undisturbed: list[Completion], lockstep: bool
) -> None:
    async with attached_to(client) as attached:
        generations = ask(client, attached)
        await stepping(client)
        await attached.collective_rpc("pause", lockstep=lockstep)
        later = attached.generate("later", max_tokens=3, ignore_eos=True)
        before = await client.collective_rpc("tandem_stats")
        for caller in (client, attached, client):
            assert await caller.collective_rpc("tandem_stats", lockstep=True) == before
        await asyncio.sleep(0.1)  # for dozens of steps, were there any
        assert await client.collective_rpc("tandem_stats") == before
        await client.collective_rpc("resume", lockstep=lockstep)
        await assert_same(generations, undisturbed)
        assert len((await later).token_ids) == 3


async def test_a_pause_goes_on_when_an_engine_dies_in_it(
    client: AsyncScaleClient, undisturbed: list[Completion]
) -> None:
    generations = ask(client)
    await stepping(client)
    await client.collective_rpc("pause")
    await kill_engine(client, 0)
    await wait_engines_ready(client)
    await wait_until(lambda: hub_of(client).state.whole)
    later = client.generate("later", engine=0, max_tokens=3, ignore_eos=True)
    assert await positions(client, lockstep=True) == [(2, 0, 0)] * 2
    assert not hub_of(client).state.running
    assert not later.done
    await client.collective_rpc("resume")
    await assert_same(generations, undisturbed)
    assert len((await later).token_ids) == 3


# --- the end


@pytest.mark.parametrize("when", ["stepping", "paused", "an engine is away", "called"])
@pytest.mark.parametrize("drain", [True, False])
async def test_closing(when: str, drain: bool) -> None:
    owner = await AsyncScaleClient(TANDEM, num_engines=2).start()
    attached = await attached_to(owner).start()
    generations = [client.generate("hello", max_tokens=200, ignore_eos=True) for client in (owner, attached)]
    await stepping(owner)
    calls: list[Awaitable[Any]] = []
    if when == "paused":
        await owner.collective_rpc("pause")
    elif when == "an engine is away":
        await kill_engine(owner, 0)
        calls = [asyncio.ensure_future(positions(owner, lockstep=True)) for _ in range(3)]
    elif when == "called":
        calls = [asyncio.ensure_future(positions(owner, lockstep=True)) for _ in range(50)]
    async with asyncio.timeout(20):
        await asyncio.sleep(0)
        await owner.close(drain=drain, timeout=0.2 if when == "paused" else 60.0)
        results = await asyncio.gather(*generations, *calls, return_exceptions=True)
        await attached.close()
    if drain and when != "paused":
        assert [len(result.token_ids) for result in results[:2]] == [200, 200]  # type: ignore[union-attr]
    else:
        assert isinstance(results[0], ClientClosedError)
        assert isinstance(results[1], EngineDeadError)
    assert all(isinstance(result, ClientClosedError | list) for result in results[2:])


# --- peers that say what no client would


def raw_peers(address: str, count: int) -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    try:
        for _ in range(count):
            peer = context.socket(zmq.DEALER)
            peer.connect(address)
            yield peer
            peer.close(linger=100)
    finally:
        context.destroy(linger=100)


ABSURD: list[Any] = [
    *(Wake(generation, wave) for generation in (0, 1, 2, 2**63, 2**64 - 1) for wave in (0, 1, 2**64 - 1)),
    GroupState(2**64 - 1, 2**64 - 1, True, 2**64 - 1, True, True),
    GroupState(10, 5, False),
    Paused(1, 0, True),
    ["wake", -1, 0],
    ["wake", "one", None],
    ["wake"],
    ["broken", 1],
]


async def test_absurd_messages_of_peers_change_nothing(client: AsyncScaleClient, undisturbed: list[Completion]) -> None:
    engine_address = processes(client)[0].address
    generations = ask(client)
    for address in (client.address, engine_address):
        for peer in raw_peers(address, 2):
            if address == client.address:
                peer.send(messages.encoder.encode(messages.Attach(messages.PROTOCOL_VERSION)))
            for _ in range(200):
                for message in ABSURD:
                    peer.send(messages.encoder.encode(message))
            await asyncio.sleep(0)
    await assert_same(generations, undisturbed)
    assert hub_of(client).state.generation == 1
    assert restarts(client) == [0, 0]
    assert client.num_malformed > 0


# --- engines that step alone


async def test_engines_that_step_alone_hear_and_say_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []

    def record(cls: type, name: str, position: int) -> None:
        original: Callable[..., Any] = getattr(cls, name)

        def wrapper(*args: Any, **options: Any) -> Any:
            said.append(args[position])
            return original(*args, **options)

        monkeypatch.setattr(cls, name, wrapper)

    record(EngineProcess, "tell", 1)
    record(Coordinator, "_send", 2)
    async with AsyncScaleClient(ALONE, num_engines=2) as owner, attached_to(owner) as attached:
        record(type(attached._engines), "_send", 1)
        await asyncio.gather(*ask(owner, attached))
        await attached.collective_rpc("kv_cache_stats", lockstep=True)
        await kill_engine(owner, 0)
        await wait_engines_ready(owner)
        assert owner._engines._tandem is None  # type: ignore[attr-defined]
        assert owner._dispatcher.on_request_sent is None
        assert attached._dispatcher.on_request_sent is None
    assert any(isinstance(message, messages.CollectiveCall) for message in said)
    assert not any(isinstance(message, GroupState | Wake) for message in said)
    (welcome,) = [message for message in said if isinstance(message, messages.Welcome)]
    assert welcome.group is None
