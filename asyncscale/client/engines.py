"""Where a client's engines come from.

It owns them, or it is attached to those of another process. Same face, no subclasses.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import zmq

from asyncscale import messages, transport
from asyncscale.client.coordinator import Coordinator
from asyncscale.client.loop_socket import LoopSocket
from asyncscale.client.supervisor import EngineProcess, Launch, Supervisor
from asyncscale.config import ModelSource
from asyncscale.errors import AsyncScaleError, EngineDeadError

# An owner that is there answers within milliseconds, unless its event loop is blocked by user code.
_ATTACH_TIMEOUT_S = 10.0


class EngineEvents(Protocol):
    """What a client wants to hear about its engines."""

    def engine_joined(self, member: messages.Member) -> None:
        """An engine takes requests from now on."""

    def engine_left(self, engine_id: int, error: EngineDeadError) -> None:
        """An engine is gone."""

    def engine_load(self, engine_id: int, load: messages.Load) -> None:
        """Newer counts, which did not come from the engine itself."""


class Engines(Protocol):
    """A set of engines, owned or attached to."""

    address: str
    model: ModelSource

    @property
    def members(self) -> list[messages.Member]:
        """The engines that take requests at this moment."""

    async def start(self) -> None:
        """Return when the engines are ready."""

    def on_load_report(self, engine_id: int, report: messages.LoadReport) -> None:
        """An engine reported its load to this client."""

    async def stop(self) -> None:
        """End or leave them. Bounded; idempotent."""


class OwnedEngines:
    """Engines that this process starts, watches and ends; the coordinator tells other clients of them."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        launch: Launch,
        events: EngineEvents,
    ) -> None:
        self.model = launch.model
        self._events = events
        self.supervisor = Supervisor(launch, self._on_death)
        try:
            self._coordinator = Coordinator(context, self.supervisor.folder, self.model)
        except BaseException:
            transport.remove_runtime_folder(self.supervisor.folder)
            raise
        self.address = self._coordinator.address

    @property
    def members(self) -> list[messages.Member]:
        """The engines that take requests at this moment."""
        return [_member(engine) for engine in self.supervisor.engines.values()]

    async def start(self) -> None:
        """Start all engines side by side. Raises EngineStartError or ModelLoadError, and leaves nothing behind."""
        await self.supervisor.start()
        for member in self.members:
            self._coordinator.join(member)

    def on_load_report(self, engine_id: int, report: messages.LoadReport) -> None:
        """Pass an engine's counts on to the attached clients."""
        self._coordinator.on_load_report(engine_id, report)

    async def stop(self) -> None:
        """End all engines."""
        self._coordinator.close()
        await self.supervisor.stop()

    def _on_death(self, engine: EngineProcess, error: EngineDeadError) -> None:
        self._coordinator.leave(engine.engine_id, str(error.args[0]), error.exit_code)
        self._events.engine_left(engine.engine_id, error)


class AttachedEngines:
    """Engines of another process, learned of from its coordinator."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], identity: bytes, address: str, events: EngineEvents
    ) -> None:
        self.address = address
        self.model: ModelSource
        self._events = events
        loop = asyncio.get_running_loop()
        self._welcome: asyncio.Future[messages.Welcome] = loop.create_future()
        self._members: dict[int, messages.Member] = {}
        if not transport.is_listening(address):
            raise AsyncScaleError(f"nobody is at {address!r}: is the owner closed, or on another host?")
        socket = transport.connect_dealer(context, address, identity)
        # An owner that is killed says no farewell: the connection ends.
        self._monitor = LoopSocket(
            loop, socket.get_monitor_socket(zmq.EVENT_DISCONNECTED), lambda _: self._all_left("its owner died")
        )
        self._socket = LoopSocket(loop, socket, self._on_frames)
        self.num_malformed = 0

    @property
    def members(self) -> list[messages.Member]:
        """The engines that take requests at this moment."""
        return list(self._members.values())

    async def start(self) -> None:
        """Learn members and counts, in one round trip. Raises AsyncScaleError when nobody answers at the address."""
        self._socket.send(messages.encoder.encode(messages.Attach(messages.PROTOCOL_VERSION)))
        try:
            async with asyncio.timeout(_ATTACH_TIMEOUT_S):
                welcome = await self._welcome
        except TimeoutError:
            raise AsyncScaleError(
                f"no client answers at {self.address!r} within {_ATTACH_TIMEOUT_S:g} s: is its owner still running?"
            ) from None
        if welcome.version != messages.PROTOCOL_VERSION:
            raise AsyncScaleError(
                f"the owner at {self.address!r} speaks protocol {welcome.version}, "
                f"this client {messages.PROTOCOL_VERSION}: use the same version of asyncscale on both sides"
            )
        self.model = welcome.model

    def on_load_report(self, engine_id: int, report: messages.LoadReport) -> None:
        """Nobody else hears of this through an attached client."""

    async def stop(self) -> None:
        """Leave."""
        self._socket.send(messages.encoder.encode(messages.Detach()))
        self._socket.close()
        self._monitor.close()

    def _on_frames(self, frames: list[bytes]) -> None:
        match messages.decode(messages.from_coordinator_decoder, frames[0]):
            case None:
                self.num_malformed += 1
            case messages.Welcome(members=members) as message:
                self._members = {member.engine_id: member for member in members}
                if not self._welcome.done():
                    self._welcome.set_result(message)
            case messages.Counts(loads):
                for engine_id, load in loads:
                    self._events.engine_load(engine_id, load)
            case messages.Joined(member):
                self._members[member.engine_id] = member
                self._events.engine_joined(member)
            case messages.Left(engine_id, incarnation, reason, exit_code):
                known = self._members.get(engine_id)
                if known is not None and known.incarnation == incarnation:
                    del self._members[engine_id]
                    self._events.engine_left(
                        engine_id, EngineDeadError(reason, engine_id=engine_id, exit_code=exit_code)
                    )
            case messages.Farewell():
                self._all_left("its owner closed")

    def _all_left(self, reason: str) -> None:
        members, self._members = self._members, {}
        for engine_id in members:
            error = EngineDeadError(f"engine {engine_id} ended: {reason}", engine_id=engine_id)
            self._events.engine_left(engine_id, error)


def _member(engine: EngineProcess) -> messages.Member:
    facts = engine.facts
    if facts is None:
        raise RuntimeError(f"engine {engine.engine_id} is not ready")
    load = messages.Load(0, 0, 0, 0, 0, 0, 0, facts.num_blocks)
    return messages.Member(engine.engine_id, engine.spec.incarnation, engine.spec.address, facts, load)
