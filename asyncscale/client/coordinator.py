"""Streams membership and load counts to every attached client, from within the owner's event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from asyncscale import messages, transport
from asyncscale.address import TcpBinding
from asyncscale.client.collective_calls import CollectiveCalls
from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.loop_socket import LoopSocket
from asyncscale.client.metrics_hub import MetricsHub
from asyncscale.client.roster import Roster
from asyncscale.client.tandem_hub import TandemHub
from asyncscale.config import ModelSource
from asyncscale.metrics.request_counters import client_id
from asyncscale.tandem.messages import GroupState, Wake

logger = logging.getLogger(__name__)

# After quiet, changed counts go out at once; then what changes within so many seconds per client goes out together: the
# more clients, the more a publish costs, and the rarer it is.
_PUBLISH_INTERVAL_S = 0.002
# A client that reads nothing is sent no more than this many messages ahead, and all it missed when it reads again.
_MAX_UNREAD = 1000
_RETRY_INTERVAL_S = 0.1
# So many calls of methods may be under way, and so many answers wait for a client that does not read.
_MAX_CALLS = 1024
# That a client is gone shows when it is sent something. So long after one has come, all are. (One that is stopped costs
# no more than one that does not read; and to ask for signs of life would end the connection of one that does not.)
_PROBE_DELAY_S = 1.0


@dataclass(slots=True)
class _Client:
    """unsent: engines whose newest counts it has not been sent. behind: it did not read, and missed more than counts.

    results: answers to its calls that it could not be sent yet.
    """

    unsent: set[int] = field(default_factory=set)
    behind: bool = False
    results: list[messages.CollectiveResult] = field(default_factory=list)


class Coordinator:
    """Tells every client who is in the roster, and the newest loads: all of it at once when it attaches, then changes.

    Each client is sent its own share in the counts (`Load.mine`), so the same report means something else to each.
    dispatcher: the owner's own; what it hears of the engines' loads is passed on. calls: all clients' go through it, so
    that all engines get them in one order. tcp: where to listen; None: in `folder`. metrics: is told of clients, and
    they are told what it knows. tandem: so is this, if the engines step together.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        folder: str,
        model: ModelSource,
        roster: Roster,
        dispatcher: Dispatcher,
        tcp: TcpBinding | None = None,
        metrics: MetricsHub | None = None,
        calls: CollectiveCalls | None = None,
        tandem: TandemHub | None = None,
    ) -> None:
        self._collective_calls = calls or CollectiveCalls(dispatcher, tandem)
        self._tandem = tandem
        self._metrics = metrics or MetricsHub(dispatcher.counters)
        self._metrics.ask = self._ask_all
        self._loop = asyncio.get_running_loop()
        self._model = model
        self._dispatcher = dispatcher
        self._roster = roster
        self._reports: dict[int, messages.LoadReport] = {}
        self._clients: dict[bytes, _Client] = {}
        self._publishing: asyncio.Handle | None = None
        self._probing: asyncio.TimerHandle | None = None
        self._next_publish = 0.0
        self._calls: set[asyncio.Task[None]] = set()
        address = transport.coordinator_address(folder)
        socket = transport.bind_router(context, address, tcp=tcp, max_unread=_MAX_UNREAD)
        self.address = transport.published_address(socket, tcp)  # what clients attach to
        self._socket = LoopSocket(self._loop, socket, self._on_frames)
        self.num_malformed = 0

    # --- what the owner tells

    def join(self, member: messages.Member) -> None:
        """An engine takes requests from now on."""
        self._roster.join(member)
        self._tell_all(messages.Joined(member))

    def leave(self, left: messages.Left) -> None:
        """An engine is gone, or is given up after that."""
        self._reports.pop(left.engine_id, None)
        for client in self._clients.values():
            client.unsent.discard(left.engine_id)
        if self._roster.leave(left):
            self._tell_all(left)

    def _on_load_report(self, engine_id: int, report: messages.LoadReport) -> None:
        """An engine's counts changed."""
        known = self._reports.get(engine_id)
        if engine_id not in self._roster or (known is not None and report.load.version < known.load.version):
            return
        self._reports[engine_id] = report
        for client in self._clients.values():
            client.unsent.add(engine_id)
        if self._publishing is None and self._clients:
            if self._loop.time() < self._next_publish:
                self._publishing = self._loop.call_at(self._next_publish, self._publish)
            else:
                self._publishing = self._loop.call_soon(self._publish)

    def tell_group(self, state: GroupState) -> None:
        """Engines in tandem run, or pause."""
        self._tell_all(state)

    def close(self) -> None:
        """Tell every client that the engines end, and close the socket. Idempotent."""
        self._tell_all(messages.Farewell())
        self._clients.clear()
        self._metrics.close()
        for call in self._calls:
            call.cancel()
        for timer in (self._publishing, self._probing):
            if timer is not None:
                timer.cancel()
        self._socket.close()

    # --- what clients are sent

    def _publish(self) -> None:
        """Tell each client the counts that it does not know yet; those who are behind wait for their turn."""
        self._publishing = None
        for identity, client in list(self._clients.items()):
            if client.unsent and not client.behind:
                self._update(identity, client)
        interval = min(_PUBLISH_INTERVAL_S * len(self._clients), messages.LOAD_INTERVAL_S)
        self._next_publish = self._loop.time() + interval

    def _tell_all(self, message: messages.FromCoordinator) -> None:
        for identity, client in list(self._clients.items()):
            if not client.behind and not self._send(identity, message):
                self._fall_behind(identity, client)

    def _update(self, identity: bytes, client: _Client) -> None:
        """Send a client all that it does not know."""
        news: list[messages.FromCoordinator] = []
        if client.behind:
            news.append(self._welcome(identity))
        elif client.unsent:
            loads = [(engine_id, self._load_for(identity, engine_id)) for engine_id in client.unsent]
            news.append(messages.Counts(loads))
        if all(self._send(identity, message) for message in [*news, *client.results]):
            client.behind = False
            client.unsent.clear()
            client.results.clear()
        else:
            self._fall_behind(identity, client)

    def _fall_behind(self, identity: bytes, client: _Client) -> None:
        client.behind = True
        self._loop.call_later(_RETRY_INTERVAL_S, self._retry, identity, client)

    def _retry(self, identity: bytes, client: _Client) -> None:
        if self._clients.get(identity) is client:
            self._update(identity, client)

    def _load_for(self, identity: bytes, engine_id: int) -> messages.Load:
        report = self._reports.get(engine_id)
        if report is None:  # nobody watched so far: the owner is alone, and whoever asks is new
            load = self._dispatcher.newest_load(engine_id) or self._roster[engine_id].load
            shares = {b"the owner": (load.mine, load.my_tokens)} if load.mine else {}
        else:
            load, shares = report.load, report.by_client or {}
        client = identity[: messages.CLIENT_ID_SIZE]
        mine, my_tokens = shares.get(client, (0, 0))
        share = messages.fair_share(self._roster[engine_id].facts.max_num_seqs, client, shares)
        return msgspec.structs.replace(load, mine=mine, my_tokens=my_tokens, share=share)

    def _welcome(self, identity: bytes) -> messages.Welcome:
        members = [
            msgspec.structs.replace(member, load=self._load_for(identity, member.engine_id))
            for member in self._roster.members
        ]
        group = self._tandem.state if self._tandem else None
        return messages.Welcome(messages.PROTOCOL_VERSION, self._model, members, self._roster.left, group)

    def _send(self, identity: bytes, message: messages.FromCoordinator) -> bool:
        """Whether it was sent. A client that is gone is forgotten; one that does not read must be sent it later."""
        try:
            self._socket.send(identity, messages.encoder.encode(message))
        except zmq.ZMQError as error:
            if error.errno == zmq.EAGAIN:
                return False
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._forget(identity, for_good=False)
        return True

    def _forget(self, identity: bytes, *, for_good: bool) -> None:
        """for_good: it said so; else it may come back."""
        self._metrics.on_leave(identity, for_good=for_good)
        if self._clients.pop(identity, None) is None:
            return
        logger.debug("client %s is gone: %d are attached", client_id(identity), len(self._clients))
        if not self._clients:
            self._dispatcher.watch_loads(None)
            self._reports.clear()  # soon out of date

    # --- what clients say

    def _on_frames(self, frames: list[bytes]) -> None:
        identity = frames[0]
        match messages.decode(messages.to_coordinator_decoder, frames[1]) if len(frames) == 2 else None:
            case None:
                self.num_malformed += 1
                self._dispatcher.counters.malformed()
            case messages.Attach(version):
                self._attach(identity, version)
            case messages.Detach():
                self._forget(identity, for_good=True)
            case messages.CollectiveCall() as call:
                self._call(identity, call)
            case messages.MetricsReport() as report:
                self._metrics.on_report(identity, report)
            case messages.MetricsQuery() as query:
                self._query(identity, query)
            case Wake() as wake if self._tandem is not None:
                self._tandem.on_wake(wake)

    def _attach(self, identity: bytes, version: int) -> None:
        self._send(identity, self._welcome(identity))
        if version != messages.PROTOCOL_VERSION:
            return
        if not self._clients:
            self._dispatcher.watch_loads(self._on_load_report)
        self._clients[identity] = _Client()
        logger.debug("client %s is here: %d are attached", client_id(identity), len(self._clients))
        self._metrics.on_attach(identity)
        if self._probing is None:
            self._probing = self._loop.call_later(_PROBE_DELAY_S, self._probe)

    def _probe(self) -> None:
        """Forget those that are gone: clients that come and go while no count changes must not add up."""
        self._probing = None
        for identity in list(self._clients):
            self._send(identity, messages.Counts([]))

    def _call(self, identity: bytes, call: messages.CollectiveCall) -> None:
        client = self._clients.get(identity)
        if len(self._calls) >= _MAX_CALLS or (client is not None and len(client.results) >= _MAX_CALLS):
            error = f"too many calls at once: at most {_MAX_CALLS}"
            refusals = [messages.EngineResult(member.engine_id, error=error) for member in self._roster.members]
            self._send(identity, messages.CollectiveResult(call.call_id, refusals))
            return
        results = self._collective_calls.start(call.method, call.args, lockstep=call.lockstep)
        self._start(self._answer(identity, call, results))

    def _start(self, answering: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(answering)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _answer(
        self, identity: bytes, call: messages.CollectiveCall, results: Awaitable[list[messages.EngineResult]]
    ) -> None:
        result = messages.CollectiveResult(call.call_id, await results)
        client = self._clients.get(identity)
        if client is None:
            return
        client.results.append(result)
        if not client.behind:
            self._update(identity, client)  # with what the engines said before they answered, such as that they pause

    # --- metrics

    def _ask_all(self, message: messages.MetricsRound) -> set[bytes]:
        """Send it to every client that reads. To which it went."""
        asked = {
            identity
            for identity, client in list(self._clients.items())
            if not client.behind and self._send(identity, message)
        }
        return asked & self._clients.keys()

    def _query(self, identity: bytes, query: messages.MetricsQuery) -> None:
        if identity not in self._clients:
            return
        if query.fresh and len(self._calls) < _MAX_CALLS:
            self._start(self._answer_after_round(identity, query.query_id))
        else:
            self._tell_metrics(identity, query.query_id)

    async def _answer_after_round(self, identity: bytes, query_id: int) -> None:
        await self._metrics.run_round()
        self._tell_metrics(identity, query_id)

    def _tell_metrics(self, identity: bytes, query_id: int) -> None:
        """A client that does not read must ask again."""
        engines, clients = self._metrics.counts()
        if identity in self._clients:
            self._send(identity, messages.MetricsAnswer(query_id, engines, clients))
