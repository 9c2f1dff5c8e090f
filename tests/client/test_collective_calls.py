"""Collective calls of several clients through a real coordinator, to engines that record what reaches them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import zmq

from asyncscale import (
    AsyncScaleClient,
    AsyncScaleError,
    ClientClosedError,
    EngineDeadError,
    messages,
    run_frontends,
    transport,
)
from asyncscale.client import engines as engines_module
from asyncscale.client.collective_calls import CollectiveCalls
from asyncscale.client.loop_socket import LoopSocket

MakeFleet = Callable[[int], Awaitable[Any]]


async def call_often(client: AsyncScaleClient, name: Any, count: int) -> list[list[Any]]:
    return await asyncio.gather(*(client.collective_rpc("profile", name, number) for number in range(count)))


# --- one order, exactly once


async def test_calls_of_several_processes_reach_all_engines_in_one_order_and_exactly_once(
    make_fleet: MakeFleet,
) -> None:
    fleet = await make_fleet(3)

    async def main(client: AsyncScaleClient, index: int) -> list[list[Any]]:
        calls = (client.collective_rpc("profile", index, number) for number in range(100))
        return await asyncio.gather(*calls)

    async with AsyncScaleClient.attach(fleet.coordinator.address) as here:
        *there, results_here = await asyncio.gather(
            run_frontends(main, 2, fleet.coordinator.address), call_often(here, 2, 100)
        )
    for index, results in enumerate([*there[0], results_here]):
        for number, result in enumerate(results):
            assert result == [[engine_id, "profile", index, number] for engine_id in (0, 1, 2)]
    first, *others = [engine.calls() for engine in fleet.engines]
    assert others == [first, first]
    assert sorted(args for _, args in first) == [[index, number] for index in range(3) for number in range(100)]


async def test_an_engine_that_joins_gets_every_later_call_once_and_is_in_everybodys_later_results(
    make_fleet: MakeFleet,
) -> None:
    fleet = await make_fleet(2)
    async with (
        AsyncScaleClient.attach(fleet.coordinator.address) as a,
        AsyncScaleClient.attach(fleet.coordinator.address) as b,
    ):
        calls = [asyncio.ensure_future(call_often(client, name, 100)) for client, name in ((a, "a"), (b, "b"))]
        await fleet.until(lambda: len(fleet.engines[0].calls()) > 20)
        joiner = fleet.join()
        results = await asyncio.gather(*calls)
        after = await asyncio.gather(a.collective_rpc("profile", "a", 100), b.collective_rpc("profile", "b", 100))
    old = fleet.engines[0].calls()
    assert fleet.engines[1].calls() == old
    assert joiner.calls()
    assert joiner.calls() == old[-len(joiner.calls()) :]
    for result in [*results[0], *results[1], *after]:
        (_, _, name, number), *_ = result
        engine_ids = [0, 1, 2] if ("profile", [name, number]) in joiner.calls() else [0, 1]
        assert result == [[engine_id, "profile", name, number] for engine_id in engine_ids]
    assert len(old) == 202
    assert all(len(result) == 3 for result in after)


# --- answers that do not come


async def test_an_engine_that_dies_before_it_answers_raises_its_death_and_the_others_are_called(
    make_fleet: MakeFleet,
) -> None:
    fleet = await make_fleet(3)
    async with AsyncScaleClient.attach(fleet.coordinator.address) as client:
        fleet.engines[1].silent = True
        call = asyncio.ensure_future(client.collective_rpc("profile", True))
        await fleet.until(lambda: fleet.engines[1].calls() == [("profile", [True])])
        fleet.kill(fleet.engines[1])
        with pytest.raises(EngineDeadError) as caught:
            await call
        assert caught.value.engine_id == 1
        assert fleet.engines[2].calls() == [("profile", [True])]
        assert await client.collective_rpc("pause") == [[0, "pause"], [2, "pause"]]


async def test_a_call_that_times_out_leaves_nothing_behind(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    fleet.engines[0].silent = True
    async with AsyncScaleClient.attach(fleet.coordinator.address) as client:
        with pytest.raises(TimeoutError):
            await client.collective_rpc("profile", True, timeout=0.01)
        assert not client._engines._calls  # type: ignore[attr-defined]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(fleet.dispatcher.call("profile", []), 0.01)
    await fleet.until(lambda: len(fleet.engines[0].calls()) == 2)
    assert len(fleet.dispatcher._fleet[0]._calls) == 1  # the attached client's: the owner waits, it does not


async def test_an_answer_that_comes_too_late_is_nobodys(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    engine = fleet.engines[0]
    engine.silent = True
    async with AsyncScaleClient.attach(fleet.coordinator.address) as client:
        with pytest.raises(TimeoutError):
            await client.collective_rpc("profile", 1, timeout=0.01)
        await fleet.until(lambda: len(engine.calls()) == 1)
        engine.silent = False
        (late,) = [entry for entry in engine.received if isinstance(entry[1], messages.Call)]
        engine._on_frames([late[0], messages.encoder.encode(late[1])])
        assert await client.collective_rpc("profile", 2) == [[0, "profile", 2]]


@pytest.mark.parametrize("who", ["attached", "owner"])
async def test_closing_a_client_ends_the_calls_that_it_waits_for(make_fleet: MakeFleet, who: str) -> None:
    fleet = await make_fleet(2)
    fleet.engines[1].silent = True
    client = await AsyncScaleClient.attach(fleet.coordinator.address).start()
    waits = (
        client.collective_rpc("profile", timeout=None) if who == "attached" else fleet.dispatcher.call("profile", [])
    )
    call = asyncio.ensure_future(waits)
    await fleet.until(lambda: len(fleet.engines[1].calls()) == 1)
    if who == "attached":
        await client.close()
    else:
        fleet.dispatcher.close(ClientClosedError("the client was closed"))
    async with asyncio.timeout(10):
        with pytest.raises(ClientClosedError):
            await call
        await client.close()


@pytest.mark.parametrize("when", ["before the call", "during the call"])
async def test_an_owner_that_is_gone_ends_the_calls_of_attached_clients(make_fleet: MakeFleet, when: str) -> None:
    fleet = await make_fleet(1)
    fleet.engines[0].silent = True
    async with AsyncScaleClient.attach(fleet.coordinator.address) as client, asyncio.timeout(10):
        if when == "before the call":
            fleet.coordinator.close()
            await fleet.until(lambda: not client.engine_loads())
        call = asyncio.ensure_future(client.collective_rpc("profile", timeout=None))
        if when == "during the call":
            await fleet.until(lambda: len(fleet.engines[0].calls()) == 1)
            fleet.coordinator.close()
        with pytest.raises(AsyncScaleError, match="its owner closed"):
            await call


# --- attaching


class FakeOwner:
    """Something bound where a coordinator would be, that records what it is sent."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: str) -> None:
        self.address = transport.coordinator_address(folder)
        self.received: list[messages.ToCoordinator | None] = []
        self.answer: messages.FromCoordinator | None = None
        self.socket = LoopSocket(
            asyncio.get_running_loop(), transport.bind_router(context, self.address), self._on_frames
        )

    def _on_frames(self, frames: list[bytes]) -> None:
        self.received.append(messages.decode(messages.to_coordinator_decoder, frames[1]))
        if self.answer is None:
            self.socket.close()
        else:
            self.socket.send(frames[0], messages.encoder.encode(self.answer))


async def test_a_newcomer_is_usable_after_one_message_to_the_coordinator_and_its_answer(
    make_fleet: MakeFleet, tmp_path: Any
) -> None:
    fleet = await make_fleet(2)
    owner = FakeOwner(fleet.context, str(tmp_path))
    owner.answer = fleet.coordinator._welcome(b"anybody")
    for engine in fleet.engines:
        engine.close()  # it waits for no engine, either
    async with AsyncScaleClient.attach(owner.address) as client:
        assert owner.received == [messages.Attach(messages.PROTOCOL_VERSION)]
        assert [load.engine_id for load in client.engine_loads()] == [0, 1]
        client.generate("goes out as soon as its engine is there")
    owner.socket.close()


async def test_an_owner_that_goes_without_an_answer_ends_the_attaching_at_once(
    make_fleet: MakeFleet, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines_module, "_ATTACH_TIMEOUT_S", 1e6)
    owner = FakeOwner((await make_fleet(0)).context, str(tmp_path))
    async with asyncio.timeout(10):
        with pytest.raises(AsyncScaleError, match="its owner died"):
            await AsyncScaleClient.attach(owner.address).start()


# --- in lockstep


async def test_an_owner_that_closes_ends_calls_that_wait_for_their_turn(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    fleet.engines[0].silent = True
    calls = CollectiveCalls(fleet.dispatcher, None)
    waiting = [asyncio.ensure_future(calls.start("profile", [], lockstep=True)) for _ in range(3)]
    await fleet.until(lambda: len(fleet.engines[0].calls()) == 1)
    assert fleet.engines[0].calls() == [("_hold_steps", [])]
    calls.close(ClientClosedError("the client was closed"))
    fleet.dispatcher.close(ClientClosedError("the client was closed"))
    async with asyncio.timeout(10):
        for call in waiting:
            with pytest.raises(ClientClosedError):
                await call
    assert not calls._tasks


async def test_engines_are_held_around_a_call_and_released_whatever_becomes_of_the_caller(
    make_fleet: MakeFleet,
) -> None:
    fleet = await make_fleet(2)
    calls = CollectiveCalls(fleet.dispatcher, None)
    caller = asyncio.ensure_future(calls.start("profile", [], lockstep=True))
    await asyncio.sleep(0)
    caller.cancel()
    results = await asyncio.gather(*(calls.start("profile", [], lockstep=True) for _ in range(2)))
    assert [len(each) for each in results] == [2, 2]
    for engine in fleet.engines:
        await fleet.until(lambda engine=engine: len(engine.calls()) == 9)
        assert [method for method, _ in engine.calls()] == ["_hold_steps", "profile", "_release_steps"] * 3
