"""A real coordinator and dispatcher in the test's own process, over engines that are only a socket and a record."""

from __future__ import annotations

import asyncio
import os
import socket as socket_module
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from asyncscale import SimulatedModel, messages, transport
from asyncscale.client.coordinator import Coordinator
from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.loop_socket import LoopSocket
from asyncscale.client.options import Limits
from asyncscale.client.policies import least_loaded
from asyncscale.client.roster import Roster

OWNER = b"c-owner"
MODEL = SimulatedModel()
FACTS = messages.EngineFacts(32_000, 8192, 64, 16, 1000, "simulated", 0.0)


class Scissors:
    """End the connections of a ROUTER, as a network that breaks does. To be closed before it."""

    def __init__(self, router: zmq.Socket[bytes]) -> None:
        self._router = router
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        self._events = router.get_monitor_socket(events, f"inproc://scissors-{id(self)}")

    def cut(self) -> None:
        descriptors: set[int] = set()
        while self._events.poll(0):
            event = recv_monitor_message(self._events)
            if event["event"] == zmq.EVENT_ACCEPTED:
                descriptors.add(event["value"])
            else:
                descriptors.discard(event["value"])
        for descriptor in descriptors:
            with socket_module.socket(fileno=os.dup(descriptor)) as end:
                end.shutdown(socket_module.SHUT_RDWR)

    def close(self) -> None:
        if not self._events.closed:
            self._router.disable_monitor()
            self._events.close(linger=0)


class FakeEngine:
    """Records what it is sent. Says its load to whoever connects; answers calls with [engine id, method, *arguments].

    While `silent`, calls are recorded and not answered.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: str, engine_id: int) -> None:
        self.engine_id = engine_id
        self.load = messages.Load(0, 0, 0, 0, 0, 0, 0, FACTS.num_blocks)
        self.received: list[tuple[bytes, messages.ToEngine]] = []
        self.silent = False
        address = f"ipc://{folder}/engine-{engine_id}"
        self.member = messages.Member(engine_id, 0, address, FACTS, self.load)
        socket = transport.bind_router(context, address)
        self._scissors = Scissors(socket)
        self._socket = LoopSocket(asyncio.get_running_loop(), socket, self._on_frames)

    def calls(self) -> list[tuple[str, Any]]:
        """The method and the arguments of every call so far, in the order of arrival."""
        return [
            (message.method, [msgspec.msgpack.decode(argument) for argument in message.args])
            for _, message in self.received
            if isinstance(message, messages.Call)
        ]

    def connects(self) -> list[bool]:
        """Whether the owner watches: what it said, each time that it said something of it."""
        return [
            message.watch_loads
            for sender, message in self.received
            if sender.startswith(OWNER) and isinstance(message, messages.Connect)
        ]

    @property
    def owner(self) -> bytes:
        """The owner's newest connection."""
        return [sender for sender, _ in self.received if sender.startswith(OWNER)][-1]

    def tell_owner(self, by_client: messages.Shares | None = None, **changes: Any) -> None:
        """Report a newer load, to the owner only."""
        fields = {name: getattr(self.load, name) for name in messages.Load.__struct_fields__}
        self.load = messages.Load(**{**fields, "version": self.load.version + 1, **changes})
        self.send(self.owner, messages.LoadReport(self.load, by_client))

    def send(self, client: bytes, message: messages.FromEngine) -> None:
        self._socket.send(client, messages.encoder.encode(message))

    def cut(self) -> None:
        """End every connection; the engine goes on."""
        self._scissors.cut()

    def close(self) -> None:
        self._scissors.close()
        self._socket.close()

    def _on_frames(self, frames: list[bytes]) -> None:
        message = messages.decode(messages.to_engine_decoder, frames[1])
        assert message is not None
        self.received.append((frames[0], message))
        if isinstance(message, messages.Connect):
            shares = {} if message.watch_loads else None
            self.send(frames[0], messages.LoadReport(self.load, shares))
        elif isinstance(message, messages.Call) and not self.silent:
            value = [self.engine_id, message.method, *map(msgspec.msgpack.decode, message.args)]
            self.send(frames[0], messages.CallResult(message.call_id, msgspec.Raw(messages.encoder.encode(value))))


class Peer:
    """A client of the coordinator that reads when the test says so."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, identity: bytes) -> None:
        self.identity = identity
        self.socket = transport.connect_dealer(context, address, identity, max_unread=1000)

    def send(self, message: messages.ToCoordinator) -> None:
        self.socket.send(messages.encoder.encode(message))

    async def receive(self) -> messages.FromCoordinator:
        """The next message."""
        assert await asyncio.to_thread(self.socket.poll, 10_000), "nothing came within 10 s"
        message = messages.decode(messages.from_coordinator_decoder, self.socket.recv())
        assert message is not None
        return message

    async def receive_until(self, condition: Callable[[Any], bool]) -> list[Any]:
        """All messages up to the first that meets the condition."""
        found: list[Any] = []
        while not found or not condition(found[-1]):
            found.append(await self.receive())
        return found


class Fleet:
    """An owner's coordinator and dispatcher, its engines, and its clients."""

    def __init__(self, folder: str, num_engines: int) -> None:
        self._folder = folder
        self._peers: list[Peer] = []
        self._scissors: Scissors | None = None
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.dispatcher = Dispatcher(self.context, OWNER, least_loaded, Limits())
        self.coordinator = Coordinator(self.context, folder, MODEL, Roster(self.dispatcher), self.dispatcher)
        self.engines: list[FakeEngine] = []
        for _ in range(num_engines):
            self.join()

    def join(self) -> FakeEngine:
        """One more engine, told to the coordinator and to the dispatcher as an owner does it."""
        engine = FakeEngine(self.context, self._folder, len(self.engines))
        self.engines.append(engine)
        self.coordinator.join(engine.member)
        return engine

    def kill(self, engine: FakeEngine) -> None:
        """The engine is found dead, as by an owner whose supervisor saw it."""
        reason = f"engine {engine.engine_id} died"
        self.coordinator.leave(messages.Left(engine.engine_id, engine.member.incarnation, reason, -9))

    def coordinator_scissors(self) -> Scissors:
        """To cut the connections of clients that attach from now on."""
        self._scissors = Scissors(self.coordinator._socket._socket)
        return self._scissors

    def peer(self) -> Peer:
        """A client that has said nothing yet."""
        self._peers.append(Peer(self.context, self.coordinator.address, b"peer-%d" % len(self._peers)))
        return self._peers[-1]

    async def attach(self) -> tuple[Peer, messages.Welcome]:
        """A client that has attached, and what it was welcomed with."""
        peer = self.peer()
        peer.send(messages.Attach(messages.PROTOCOL_VERSION))
        welcome = await peer.receive()
        assert isinstance(welcome, messages.Welcome)
        return peer, welcome

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until something has arrived that no event of the test's own tells of."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def owner_knows(self) -> None:
        """Return when the owner's table has the newest load of every engine."""
        async with asyncio.timeout(10):
            while not all(self._is_known(engine) for engine in self.engines):
                await self.dispatcher.wait_load_change()

    def _is_known(self, engine: FakeEngine) -> bool:
        known = {load.engine_id: load for load in self.dispatcher.loads()}
        load = known.get(engine.engine_id)
        return load is not None and (load.running, load.waiting) == (engine.load.running, engine.load.waiting)

    def close(self) -> None:
        self.dispatcher.close(RuntimeError("the test is over"))
        if self._scissors is not None:
            self._scissors.close()
        self.coordinator.close()
        for engine in self.engines:
            engine.close()
        for peer in self._peers:
            peer.socket.close(linger=0)
        self.context.destroy(linger=0)


@pytest.fixture
async def make_fleet() -> AsyncIterator[Callable[[int], Awaitable[Fleet]]]:
    """await make_fleet(number of engines) -> Fleet, whose engines all know the owner."""
    fleets: list[Fleet] = []
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:

        async def make(num_engines: int) -> Fleet:
            (Path(folder) / f"{len(fleets)}").mkdir()
            fleet = Fleet(f"{folder}/{len(fleets)}", num_engines)
            fleets.append(fleet)
            await fleet.until(lambda: all(engine.received for engine in fleet.engines))
            return fleet

        yield make
        for fleet in fleets:
            fleet.close()
