"""Where a client's engines come from.

It owns them, or it is attached to those of another process. Same face, no subclasses.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Sequence
from typing import Protocol

import msgspec
import zmq

from asyncscale import messages, transport
from asyncscale.address import shown
from asyncscale.client.collective_calls import CollectiveCalls
from asyncscale.client.coordinator import Coordinator
from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.engine_process import EngineProcess
from asyncscale.client.exceptions import fresh
from asyncscale.client.loop_socket import LoopSocket
from asyncscale.client.loss_monitor import GRACE_S
from asyncscale.client.metrics_hub import MetricsHub
from asyncscale.client.metrics_link import MetricsLink
from asyncscale.client.roster import Roster
from asyncscale.client.supervisor import Launch, Supervisor
from asyncscale.client.tandem_hub import TandemHub
from asyncscale.client.weight_updates import WeightUpdates
from asyncscale.config import ModelSource
from asyncscale.errors import AsyncScaleError, ClientClosedError, EngineError
from asyncscale.metrics.snapshot import Counts
from asyncscale.tandem.client import ClientWaves
from asyncscale.tandem.messages import FromTandemEngine, GroupState

logger = logging.getLogger(__name__)

# An owner that is there answers within milliseconds, unless its event loop is blocked by user code.
_ATTACH_TIMEOUT_S = 10.0
# What the coordinator sends beyond it, it keeps, and sends the newest state of it later.
_MAX_UNREAD = 1000


class Engines(Protocol):
    """A set of engines, owned or attached to."""

    address: str
    model: ModelSource
    roster: Roster

    @property
    def num_malformed(self) -> int:
        """Messages over the coordinator's socket that were dropped because they made no sense."""

    async def start(self) -> None:
        """Return when the engines are ready."""

    async def call(
        self, method: str, args: Sequence[msgspec.Raw], *, lockstep: bool = False
    ) -> list[messages.EngineResult]:
        """Run a method once on every engine, in one order with all other clients' calls.

        lockstep: while none of them computes.
        """

    def counts(self) -> Counts:
        """What engines and clients have counted, as far as is known here. From any thread."""

    async def fresh_counts(self) -> Counts:
        """What they have counted until now."""

    async def stop(self) -> None:
        """End or leave them. Bounded; idempotent."""

    def abandon(self) -> None:
        """As `stop`, without the event loop, which is closed. Blocks for moments."""


class OwnedEngines:
    """Engines that this process starts, watches and ends; the coordinator tells other clients of them."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        launch: Launch,
        dispatcher: Dispatcher,
    ) -> None:
        self.model = launch.model
        self.roster = Roster(dispatcher)
        self._dispatcher = dispatcher
        self._metrics = MetricsHub(dispatcher.counters)
        self.supervisor = Supervisor(launch, self._on_ready, self._on_death, self._on_report)
        folder = self.supervisor.folder
        self._tandem: TandemHub | None = None
        if launch.in_tandem:
            self._tandem = TandemHub(len(launch.places), folder, self.supervisor.tell_all, self._tell_clients)
            dispatcher.on_request_sent = self._tandem.request_sent
        self._calls = CollectiveCalls(dispatcher, self._tandem)
        self._weights = WeightUpdates(self.model, self.supervisor, self._calls.start)
        self._calls.own_methods["update_weights"] = self._weights.run
        try:
            self.supervisor.spawn()
            self._coordinator = Coordinator(
                context,
                folder,
                self.model,
                self.roster,
                dispatcher,
                launch.tcp,
                self._metrics,
                self._calls,
                self._tandem,
            )
        except BaseException:
            self.supervisor.abandon()
            raise
        self.address = self._coordinator.address

    async def start(self) -> None:
        """Wait until all engines are ready. Raises EngineStartError or ModelLoadError; then they are to be stopped."""
        await self.supervisor.wait_ready()

    async def call(
        self, method: str, args: Sequence[msgspec.Raw], *, lockstep: bool = False
    ) -> list[messages.EngineResult]:
        """Run a method once on every engine, in one order with all other clients' calls."""
        try:
            return await self._calls.start(method, args, lockstep=lockstep)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise ClientClosedError("the client was closed") from None

    @property
    def weight_version(self) -> int:
        """How often the weights were changed."""
        return self._weights.version

    def counts(self) -> Counts:
        """What engines have counted until now, and clients as far as they have said."""
        return self._metrics.counts()

    async def fresh_counts(self) -> Counts:
        """After a round over all clients."""
        await self._metrics.run_round()
        return self._metrics.counts()

    async def stop(self) -> None:
        """End all engines."""
        self._calls.close(ClientClosedError("the client was closed"))
        self._coordinator.close()
        await self.supervisor.stop()

    def abandon(self) -> None:
        """End all engines without the event loop, which is closed; clients that are attached see that."""
        self.supervisor.abandon()

    def _on_ready(self, engine: EngineProcess, facts: messages.EngineFacts, last_error: str | None) -> None:
        self._metrics.engines.up(engine.engine_id, engine.spec.counters_path)
        load = messages.Load(0, 0, 0, 0, 0, 0, 0, facts.num_blocks)
        spec = engine.spec
        self._coordinator.join(
            messages.Member(
                spec.engine_id, spec.incarnation, engine.address, facts, load, last_error, spec.progress_path
            )
        )
        if self._tandem is not None:
            self._tandem.engine_joined(spec.engine_id)

    def _on_report(self, report: FromTandemEngine) -> None:
        if self._tandem is not None:
            self._tandem.on_report(report)

    def _tell_clients(self, state: GroupState) -> None:
        self._coordinator.tell_group(state)

    @property
    def num_malformed(self) -> int:
        """Messages of attached clients that were dropped because they made no sense."""
        return self._coordinator.num_malformed

    def _on_death(self, engine: EngineProcess, error: EngineError, returns: bool) -> None:
        self._metrics.engines.down(engine.engine_id, hung=engine.hung)
        if self._tandem is not None:
            self._tandem.engine_died(engine.engine_id)
            if not returns:
                self._tandem.end(error)
        self._coordinator.leave(
            messages.Left(
                engine.engine_id,
                engine.spec.incarnation,
                str(error.args[0]),
                error.exit_code,
                error.stderr_tail,
                returns,
            )
        )


class AttachedEngines:
    """Engines of another process, learned of from its coordinator."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], identity: bytes, address: str, dispatcher: Dispatcher
    ) -> None:
        self.address = address
        self.model: ModelSource
        self._dispatcher = dispatcher
        self._loop = asyncio.get_running_loop()
        self._welcome: asyncio.Future[messages.Welcome] = self._loop.create_future()
        self.roster = Roster(dispatcher)
        dispatcher.on_unreachable = self._on_unreachable
        self._waves: ClientWaves | None = None  # of engines that step together
        self._calls: dict[int, asyncio.Future[list[messages.EngineResult]]] = {}
        self._ended: AsyncScaleError | None = None  # why there will be no more answers
        self._call_ids = itertools.count()
        if not transport.is_listening(address):
            raise self._nobody()
        self._context = context
        self._client_id = identity
        self._num_malformed = 0
        self._loss: asyncio.TimerHandle | None = None
        self._metrics = MetricsLink(self._loop, dispatcher.counters, lambda: self.roster.up, self._send)
        self._connect()

    def _connect(self) -> None:
        identity = self._client_id + os.urandom(messages.CONNECTION_ID_SIZE)
        socket, events = transport.connect_monitored_dealer(
            self._context, self.address, identity, max_unread=_MAX_UNREAD
        )
        self._let_in = False
        self._stop_monitor = socket.disable_monitor
        self._monitor = LoopSocket(self._loop, events, self._on_connection_event)
        self._socket = LoopSocket(self._loop, socket, self._on_frames)
        self._send(messages.Attach(messages.PROTOCOL_VERSION))

    async def start(self) -> None:
        """Learn members and counts, in one round trip. Raises AsyncScaleError when nobody answers at the address."""
        try:
            async with asyncio.timeout(_ATTACH_TIMEOUT_S):
                welcome = await self._welcome
        except TimeoutError:
            raise AsyncScaleError(
                f"no client answers at {shown(self.address)!r} within {_ATTACH_TIMEOUT_S:g} s: "
                "is its owner still running?"
            ) from None
        self.model = welcome.model

    @property
    def num_malformed(self) -> int:
        """Messages of the coordinator that were dropped because they made no sense."""
        return self._num_malformed

    async def call(
        self, method: str, args: Sequence[msgspec.Raw], *, lockstep: bool = False
    ) -> list[messages.EngineResult]:
        """Run a method once on every engine, in one order with all other clients' calls: the coordinator's."""
        if self._ended is not None:
            raise fresh(self._ended)
        call_id = next(self._call_ids)
        self._send(messages.CollectiveCall(call_id, method, list(args), lockstep))
        future: asyncio.Future[list[messages.EngineResult]] = self._loop.create_future()
        self._calls[call_id] = future
        try:
            return await future
        finally:
            del self._calls[call_id]

    def counts(self) -> Counts:
        """What the owner said last, and what this client has counted."""
        return self._metrics.counts()

    async def fresh_counts(self) -> Counts:
        """What the owner says after a round over all clients."""
        return await self._metrics.fresh()

    async def stop(self) -> None:
        """Leave."""
        self._end(ClientClosedError("the client was closed"))
        self._metrics.report()
        self._metrics.close()
        self._send(messages.Detach())
        self._disconnect()

    def _disconnect(self) -> None:
        if self._loss is not None:
            self._loss.cancel()
        self._stop_monitor()
        self._monitor.close()
        self._socket.close()

    def abandon(self) -> None:
        """Nothing: engines and owner notice that a client is gone."""

    def _send(self, message: messages.ToCoordinator) -> None:
        with contextlib.suppress(zmq.Again):  # what is at the address is no owner, and libzmq gave up on it
            self._socket.send(messages.encoder.encode(message))

    def _on_frames(self, frames: list[bytes]) -> None:
        match messages.decode(messages.from_coordinator_decoder, frames[0]) if len(frames) == 1 else None:
            case None:
                self._num_malformed += 1
                self._dispatcher.counters.malformed()
            case messages.Welcome() as welcome:
                self._on_welcome(welcome)
            case messages.Counts(loads):
                for engine_id, load in loads:
                    self._dispatcher.report(engine_id, load)
            case messages.Joined(member):
                self.roster.join(member)
            case messages.Left() as left:
                self.roster.leave(left)
            case messages.CollectiveResult(call_id, results):
                future = self._calls.get(call_id)
                if future is not None and not future.done():
                    future.set_result(results)
            case messages.MetricsRound(round_id):
                self._metrics.on_round(round_id)
            case messages.MetricsAnswer() as answer:
                self._metrics.on_answer(answer)
            case GroupState() as state:
                self._on_group_state(state)
            case messages.Farewell():
                self._owner_left("its owner closed", logging.INFO)

    def _on_welcome(self, welcome: messages.Welcome) -> None:
        """The first one starts the client; a later one stands for all the messages that it missed."""
        if welcome.version != messages.PROTOCOL_VERSION:
            self._end(
                AsyncScaleError(
                    f"the owner at {shown(self.address)!r} speaks protocol {welcome.version}, "
                    f"this client {messages.PROTOCOL_VERSION}: use the same version of asyncscale on both sides"
                )
            )
            return
        if welcome.group is not None:
            self._on_group_state(welcome.group)
        self.roster.replace(welcome.members, welcome.left)
        self._metrics.on_welcome()
        if not self._welcome.done():
            self._welcome.set_result(welcome)

    def _on_group_state(self, state: GroupState) -> None:
        if self._waves is None:
            self._waves = ClientWaves()
            self._dispatcher.on_request_sent = self._request_sent
        self._waves.on_group_state(state)

    def _request_sent(self) -> None:
        wake = self._waves.request_sent() if self._waves else None
        if wake is not None:
            self._send(wake)

    def _on_connection_event(self, frames: list[bytes]) -> None:
        match transport.connection_event(frames):
            case "connected":
                self._let_in = True
            case "unreachable" if self._let_in:
                self._loss = self._loop.call_later(GRACE_S, self._on_loss)
            case "disconnected" if self._let_in:
                pass  # "unreachable" follows what has arrived before
            case "refused" | "disconnected" | "unreachable" if self._welcome.done():
                self._owner_left("its owner died", logging.ERROR)
            case "refused" | "disconnected":
                self._end(
                    AsyncScaleError(
                        f"what listens at {shown(self.address)!r} does not let this client in: "
                        "is the address whole, with its key, and that of an owner that still runs?"
                    )
                )
            case "unreachable":
                self._end(self._nobody())

    def _nobody(self) -> AsyncScaleError:
        return AsyncScaleError(f"nobody is at {shown(self.address)!r}: is the owner closed, or on another host?")

    def _on_loss(self) -> None:
        """The owner was killed, and could say no farewell; or a network broke, and this client is welcomed anew."""
        self._socket.drain()
        if self._ended is not None:
            return
        if not transport.is_listening(self.address):
            self._owner_left("its owner died", logging.ERROR)
            return
        self._disconnect()
        self._fail_calls(AsyncScaleError("the connection to the owner was lost before it answered"))
        self._connect()

    def _on_unreachable(self, member: messages.Member) -> None:
        """An engine is dead. Its owner may know more, unless it is dead as well or its event loop is blocked."""
        self._socket.drain()
        engine_id, incarnation = member.engine_id, member.incarnation
        if engine_id in self.roster and self.roster[engine_id].incarnation == incarnation:
            self.roster.leave(messages.Left(engine_id, incarnation, f"engine {engine_id} died", None, returns=True))

    def _owner_left(self, reason: str, level: int) -> None:
        if self._ended is None:
            logger.log(level, "all engines ended: %s", reason)
        self.roster.leave_all(reason)
        self._metrics.on_owner_left()
        self._end(AsyncScaleError(f"the engines ended: {reason}"))

    def _end(self, error: AsyncScaleError) -> None:
        """Nothing more comes from the owner, or is wanted."""
        self._ended = self._ended or error
        if not self._welcome.done():
            self._welcome.set_exception(error)
        self._fail_calls(error)

    def _fail_calls(self, error: AsyncScaleError) -> None:
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
