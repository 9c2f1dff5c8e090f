"""Several clients on the same engines, in one process and in several."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from asyncscale import (
    AsyncScaleClient,
    ClientClosedError,
    EngineDeadError,
    FrontendError,
    SimulatedModel,
    run_frontends,
)
from asyncscale.testing import kill_engine, wait_until

MODEL = SimulatedModel(base_ms=1, decode_us=1, prefill_us=0.1)
LONG: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True}
SHORT: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 1.0}
NUM_PROMPTS, NUM_LONG = 5, 8

Tokens = dict[str, list[int]]


async def reach(client: AsyncScaleClient, in_flight: int) -> None:
    """Wait until the client's table shows so many requests, of all clients together."""
    async with asyncio.timeout(10):
        async for loads in client.watch_loads():
            if sum(load.in_flight for load in loads) == in_flight:
                return


async def wait_running(client: AsyncScaleClient, count: int) -> None:
    """Wait until the engines themselves say that so many requests run."""
    async with asyncio.timeout(10):
        async for loads in client.watch_loads():
            if sum(load.running for load in loads) == count:
                return


async def assert_idle(client: AsyncScaleClient) -> None:
    """No engine has a request of anybody's, and every KV block is free."""
    async with asyncio.timeout(10):
        async for loads in client.watch_loads():
            if all(load.in_flight == load.running == load.waiting == 0 for load in loads):
                break
    for stats in await client.collective_rpc("kv_cache_stats"):
        assert stats["free_blocks"] == stats["num_blocks"]


async def serve(client: AsyncScaleClient, name: str) -> Tokens:
    """The tokens of some prompts that only this client has, all asked for at once."""
    prompts = [f"{name}, prompt {i}" for i in range(NUM_PROMPTS)]
    completions = await asyncio.gather(
        *(client.generate(prompt, seed=seed, **SHORT) for seed, prompt in enumerate(prompts))
    )
    return {prompt: completion.token_ids for prompt, completion in zip(prompts, completions, strict=True)}


async def outcomes(generations: list[Any]) -> list[Any]:
    """How they ended: the number of tokens, or the kind of error."""
    ended = await asyncio.gather(*generations, return_exceptions=True)
    return [type(end) if isinstance(end, BaseException) else len(end.token_ids) for end in ended]


@pytest.fixture(scope="module")
def alone() -> Tokens:
    """What `serve` gives, each prompt alone on one engine."""

    async def run() -> Tokens:
        tokens: Tokens = {}
        async with AsyncScaleClient(MODEL, num_engines=1) as client:
            for name in ("owner", *(f"client {index}" for index in range(4))):
                for seed in range(NUM_PROMPTS):
                    prompt = f"{name}, prompt {seed}"
                    tokens[prompt] = (await client.generate(prompt, seed=seed, **SHORT)).token_ids
        return tokens

    return asyncio.run(run())


# --- every permutation


@pytest.mark.parametrize("owner_closes_first", [True, False], ids=["owner-closes-first", "clients-leave-first"])
@pytest.mark.parametrize("owner_serves", [True, False], ids=["owner-serves", "owner-idle"])
@pytest.mark.parametrize("num_clients", [1, 2, 4])
@pytest.mark.parametrize("num_engines", [1, 2, 4])
async def test_every_stream_is_complete_and_its_own_and_nothing_is_left_over(
    num_engines: int, num_clients: int, owner_serves: bool, owner_closes_first: bool, alone: Tokens
) -> None:
    """Of several clients, the last is in the owner's process, and all others in processes of their own."""

    async def main(client: AsyncScaleClient, index: int) -> tuple[Tokens, list[Any]]:
        tokens = await serve(client, f"client {index}")
        if not owner_closes_first:
            return tokens, []
        return tokens, await outcomes([client.generate("until the end", **LONG) for _ in range(NUM_LONG)])

    async def here(index: int) -> tuple[Tokens, list[Any]]:
        async with AsyncScaleClient.attach(owner.address) as client:
            return await main(client, index)

    owner = await AsyncScaleClient(MODEL, num_engines=num_engines).start()
    num_processes = max(1, num_clients - 1)
    runs = [asyncio.ensure_future(run_frontends(main, num_processes, owner.address))]
    runs += [asyncio.gather(here(index)) for index in range(num_processes, num_clients)]
    tokens: Tokens = await serve(owner, "owner") if owner_serves else {}
    own = [owner.generate("until the end", **LONG) for _ in range(NUM_LONG * owner_serves * owner_closes_first)]
    if owner_closes_first:
        await reach(owner, NUM_LONG * num_clients + len(own))
        await owner.close(drain=False)
    ends = []
    for run in runs:
        for its_tokens, its_ends in await run:
            tokens |= its_tokens
            ends += its_ends
    names = [f"client {index}" for index in range(num_clients)] + ["owner"] * owner_serves
    assert tokens == {prompt: alone[prompt] for prompt in alone if prompt.split(",")[0] in names}
    if owner_closes_first:
        assert ends == [EngineDeadError] * NUM_LONG * num_clients
        assert set(await outcomes(own)) <= {ClientClosedError}
    else:
        await assert_idle(owner)
        await owner.close()


# --- coming and going


async def test_a_newcomer_knows_at_once_what_others_have_in_flight() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2) as owner:
        generations = [owner.generate("hello", **LONG) for _ in range(6)]
        await wait_running(owner, 6)
        async with AsyncScaleClient.attach(owner.address) as other:
            assert [(load.mine, load.others) for load in other.engine_loads()] == [(0, 3), (0, 3)]
        for generation in generations:
            generation.abort()
        await assert_idle(owner)


async def test_clients_come_and_go_while_requests_run_and_take_their_requests_with_them(alone: Tokens) -> None:
    async def come_and_go(address: str, index: int) -> list[Tokens]:
        seen = []
        for _ in range(5):
            async with AsyncScaleClient.attach(address) as client:
                assert len(client.engine_loads()) == 2
                unfinished = [client.generate("leaves before the end", **LONG) for _ in range(3)]
                seen.append(await serve(client, f"client {index}"))
                assert not any(generation.done for generation in unfinished)
        return seen

    async def main(client: AsyncScaleClient, index: int) -> list[Tokens]:
        return await come_and_go(client.address, index)

    async with AsyncScaleClient(SimulatedModel(base_ms=2), num_engines=2) as owner:
        lasting = [owner.generate("stays", **LONG) for _ in range(4)]
        there, *here = await asyncio.gather(
            run_frontends(main, 2, owner.address), *(come_and_go(owner.address, index) for index in (2, 3))
        )
        for index, seen in enumerate([*there, *here]):
            expected = {prompt: ids for prompt, ids in alone.items() if prompt.startswith(f"client {index},")}
            assert seen == [expected] * 5
        await reach(owner, 4)
        assert not any(generation.done for generation in lasting)
        assert {(load.mine, load.others) for load in owner.engine_loads()} == {(2, 0)}
        for generation in lasting:
            generation.abort()
        await assert_idle(owner)


async def test_a_client_that_is_killed_takes_its_requests_with_it() -> None:
    async def main(client: AsyncScaleClient, index: int) -> None:
        generations = [client.generate("hello", **LONG) for _ in range(6)]
        await wait_running(client, len(generations))
        os.kill(os.getpid(), signal.SIGKILL)

    slow = SimulatedModel(base_ms=5)  # its requests would last longer than anybody waits here
    async with AsyncScaleClient(slow, num_engines=2) as owner, AsyncScaleClient.attach(owner.address) as other:
        with pytest.raises(FrontendError):
            await run_frontends(main, 1, owner.address)
        await assert_idle(owner)
        await assert_idle(other)


async def test_clients_see_that_an_engine_died_and_their_requests_go_on_elsewhere() -> None:
    async def main(client: AsyncScaleClient, index: int) -> tuple[list[int], list[Any]]:
        ends = await outcomes([client.generate("hello", max_tokens=3000, ignore_eos=True) for _ in range(6)])
        return [load.engine_id for load in client.engine_loads()], ends

    async with AsyncScaleClient(MODEL, num_engines=2, max_restarts=0) as owner:
        engines = owner._engines.supervisor.engines  # type: ignore[attr-defined]
        run = asyncio.ensure_future(run_frontends(main, 2, owner.address))
        await reach(owner, 12)
        os.kill(engines[1].pid, signal.SIGKILL)
        assert await run == [([0], [3000] * 6)] * 2
        await assert_idle(owner)


# --- processes that do not answer


class Wire:
    """A pipe to each front end, for what a test and its `main` agree on, by its index."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "wire")
        self._listener = connection.Listener(self.path)
        self._ends: dict[int, Any] = {}

    async def accept(self, count: int) -> None:
        for _ in range(count):
            end = await asyncio.to_thread(self._listener.accept)
            self._ends[end.recv()] = end

    def __getitem__(self, index: int) -> Any:
        return self._ends[index]

    def close(self) -> None:
        for end in (self._listener, *self._ends.values()):
            end.close()


@pytest.fixture
async def wire(runtime_folders: Path) -> AsyncIterator[Wire]:
    wire = Wire(runtime_folders)
    yield wire
    wire.close()


async def test_while_the_owners_loop_is_blocked_others_stream_and_route_by_what_engines_tell_them(wire: Wire) -> None:
    path = wire.path

    async def main(client: AsyncScaleClient, index: int) -> list[int]:
        with connection.Client(path) as end:
            end.send(index)
            stream = client.generate("runs all the time", **LONG)
            tokens = aiter(stream)
            await anext(tokens)
            end.send("streams")
            await asyncio.to_thread(end.recv)  # from here on the owner is blocked
            for _ in range(500):
                await anext(tokens)
            stream.abort()
            end.send("streamed on")
            await asyncio.to_thread(end.recv)
            await reach(client, 20 * index)  # the second is idle, and sees what the first has
            seen = [load.others for load in client.engine_loads()]
            burst = [aiter(client.generate("hello", **LONG)) for _ in range(20 - 20 * index)]
            await asyncio.gather(*map(anext, burst))
            newcomer = AsyncScaleClient.attach(client.address)
            attaching = asyncio.ensure_future(newcomer.start())
            await asyncio.sleep(0)
            end.send((seen, [load.mine for load in client.engine_loads()], attaching.done()))
            await asyncio.to_thread(end.recv)
            await attaching
            completion = await newcomer.generate("served", max_tokens=7, ignore_eos=True)
            await newcomer.close()
            return completion.token_ids

    async with AsyncScaleClient(MODEL, num_engines=2) as owner:
        run = asyncio.ensure_future(run_frontends(main, 2, owner.address))
        await wire.accept(2)
        for index in (0, 1):
            assert await asyncio.to_thread(wire[index].recv) == "streams"
        for index in (0, 1):
            wire[index].send("blocked now")
        assert [wire[index].recv() for index in (0, 1)] == ["streamed on"] * 2
        told = []
        for index in (0, 1):
            wire[index].send("route")
            told.append(wire[index].recv())
        assert told[0] == ([0, 0], [10, 10], False)
        assert told[1] == ([10, 10], [0, 0], False)
        for index in (0, 1):
            wire[index].send("unblocked")
        assert [len(token_ids) for token_ids in await run] == [7, 7]
        await assert_idle(owner)


@pytest.mark.parametrize("how", ["stopped", "blocked"])
async def test_a_client_that_reads_nothing_is_sent_no_end_of_messages_and_knows_all_when_it_reads(
    wire: Wire, how: str
) -> None:
    path = wire.path

    async def main(client: AsyncScaleClient, index: int) -> list[Any]:
        with connection.Client(path) as end:
            end.send(index)
            end.send(os.getpid())
            if how == "blocked":
                end.recv()
            else:
                await asyncio.to_thread(end.recv)
            async with asyncio.timeout(30):
                async for loads in client.watch_loads():
                    if [(load.engine_id, load.mine, load.others) for load in loads] == [(0, 0, 3)]:
                        return await client.collective_rpc("kv_cache_stats")
            return []

    async with AsyncScaleClient(MODEL, num_engines=2) as owner:
        engines = owner._engines
        run = asyncio.ensure_future(run_frontends(main, 1, owner.address))
        await wire.accept(1)
        process = psutil.Process(wire[0].recv())
        if how == "stopped":
            process.suspend()
            await wait_until(lambda: process.status() == psutil.STATUS_STOPPED)
        (client,) = engines._coordinator._clients.values()  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            while not client.behind:
                await asyncio.gather(*(owner.generate("hello", max_tokens=2) for _ in range(20)))
        await kill_engine(owner, 1)
        generations = [owner.generate("hello", **LONG) for _ in range(3)]
        await reach(owner, 3)
        process.resume()
        wire[0].send("go on")
        ((stats,),) = await run
        assert stats["num_blocks"] == MODEL.num_kv_blocks
        for generation in generations:
            generation.abort()


# --- leaving


async def test_an_owner_that_drains_lets_attached_clients_finish() -> None:
    owner = await AsyncScaleClient(MODEL, num_engines=2).start()
    async with AsyncScaleClient.attach(owner.address) as other:
        generations = [other.generate(f"prompt {i}", max_tokens=500, ignore_eos=True) for i in range(6)]
        await reach(owner, 6)
        await owner.close(drain=True)
        assert [len((await generation).token_ids) for generation in generations] == [500] * 6
        with pytest.raises(EngineDeadError):
            other.generate("hello")


async def test_a_drain_does_not_wait_for_other_clients_for_ever() -> None:
    owner = await AsyncScaleClient(SimulatedModel(base_ms=50), num_engines=1).start()
    async with AsyncScaleClient.attach(owner.address) as other:
        generation = other.generate("hello", **LONG)
        await reach(owner, 1)
        await owner.close(drain=True, timeout=0.1)
        with pytest.raises(EngineDeadError):
            await generation


# --- start-up lines


async def test_start_up_lines_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="asyncscale")
    async with (
        AsyncScaleClient(MODEL, num_engines=3) as owner,
        AsyncScaleClient.attach(owner.address),
        AsyncScaleClient.attach(owner.address),
    ):
        pass
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("3 engines ready in ")
