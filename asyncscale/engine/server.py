"""An engine's one thread: take what the socket holds, step, send."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
import zmq

from asyncscale import messages, transport
from asyncscale.engine.core import EngineCore
from asyncscale.engine.profiler import Profiler
from asyncscale.metrics.engine_counters import EngineCounters
from asyncscale.progress import Progress
from asyncscale.tandem.member import GroupMember

# Who watches is told of changes at most so often: all engines together keep it busy for one or two percent of its time.
_WATCH_INTERVAL_S = 0.0005  # times the number of engines

# So many messages are taken between two steps: a client that floods delays its own, as libzmq takes them from all
# clients in turn.
_BURST = 1024

# That a client is gone shows when it is sent something; so whoever has requests here is, at least so often.
_PROBE_INTERVAL_S = 0.4
_MAX_UNREAD = 2 * messages.READ_INTERVAL


@dataclass(slots=True)
class _Peer:
    """A client that said Connect.

    told_version: of the newest load that it was sent. num_unread: messages that it was sent, less those of which it
    said that they are read.
    """

    watches_loads: bool
    told_version: int = -1
    next_report: float = 0.0
    num_unread: int = 0

    @property
    def reads(self) -> bool:
        """Whether there is a point in telling it the load."""
        return self.num_unread < _MAX_UNREAD


class _Stepper(Protocol):
    """What computes: the core, or the group that it is in."""

    @property
    def has_work(self) -> bool: ...

    def step(self, meanwhile: Callable[[], None]) -> dict[bytes, messages.Outputs]: ...


class EngineServer:
    """An `EngineCore` behind a ROUTER socket. progress: where to show that it goes on. counters: those of the core.

    member: of a group of engines that step together; None: it steps whenever it has requests.
    """

    def __init__(
        self,
        core: EngineCore,
        socket: zmq.Socket[bytes],
        num_engines: int,
        progress: Progress | None = None,
        counters: EngineCounters | None = None,
        member: GroupMember | None = None,
    ) -> None:
        self._core = core
        self._member = member
        self._stepper: _Stepper = member or core
        self._socket = socket
        self._input = zmq.Poller()
        self._input.register(socket, zmq.POLLIN)
        if member is not None:
            self._input.register(member.fileno(), zmq.POLLIN)
        self._progress = progress or Progress()
        self._counters = counters or EngineCounters()
        self._methods = {**core.methods, "profile": Profiler().profile, "process_info": self._process_info}
        if member is not None:
            self._methods["tandem_stats"] = member.stats
        self._peers: dict[bytes, _Peer] = {}
        self._outputs: dict[bytes, messages.Outputs] = {}  # of the last step, not sent yet
        self._gone: set[bytes] = set()  # clients that could not be sent to
        self._watch_interval = _WATCH_INTERVAL_S * num_engines
        self._told_version = core.load_version  # which every peer knows
        self._next_report = math.inf  # when those who do not know the newest load may be told
        self._next_probe = math.inf
        self._has_newcomers = False  # since the last probe
        self.num_malformed = 0

    def run(self) -> None:
        """Serve for ever; the lifeline ends the process."""
        while True:
            self._receive()
            if self._member is not None:
                self._member.follow()
            if self._stepper.has_work:
                self._progress.begin_step()
                outputs = self._stepper.step(meanwhile=self._send_outputs)
                self._progress.end_step()
                self._send_outputs()  # those of the step before, if this one computed nothing
                self._outputs = outputs
            self._settle()
            self._probe_in_time()
            while self._gone:  # their requests end, and the others must hear of that
                self._forget(self._gone.pop())
                self._settle()
            if self._member is not None:
                self._member.report()

    def _settle(self) -> None:
        """Leave nothing unsaid when there is no next step to say it in."""
        if not self._stepper.has_work:
            self._send_outputs()
            self._report_load()

    def _receive(self) -> None:
        """Take all that has arrived; without work to do, sleep until something does."""
        if not self._stepper.has_work:
            self._progress.rest()
            self._input.poll(self._idle_ms())
            self._progress.work()
        for _ in range(_BURST):
            frames = transport.receive(self._socket)
            if frames is None:
                return
            message = messages.decode(messages.to_engine_decoder, frames[1]) if len(frames) == 2 else None
            if message is None:
                self._drop()
            else:
                self._handle(frames[0], message)

    def _idle_ms(self) -> int | None:
        """How long to sleep while nothing arrives: for ever, or until somebody is to be told something."""
        wakeup = min(self._next_report, self._next_probe)
        if wakeup == math.inf:
            return None
        return max(0, math.ceil(1000 * (wakeup - time.monotonic())))

    def _handle(self, client: bytes, message: messages.ToEngine) -> None:
        match message:
            case messages.Add():
                self._core.add(client, message)
            case messages.Abort(request_ids):
                self._core.abort(client, request_ids)
            case messages.Call():
                accepting = self._core.accepting
                result = self._call(message)
                if self._core.accepting != accepting:
                    self._report_at_once()  # whoever knows the answer knows that, too
                self._send(client, result)
            case messages.Read(count):
                self._on_read(client, count)
            case messages.Connect(version, watches_loads):
                self._connect(client, version, watches_loads)
            case messages.Disconnect():
                self._forget(client)

    def _drop(self) -> None:
        """A message made no sense."""
        self.num_malformed += 1
        self._counters.malformed()

    def _connect(self, client: bytes, version: int, watches_loads: bool) -> None:
        if version != messages.PROTOCOL_VERSION:
            self._drop()
            return
        known = self._peers.get(client)
        self._peers[client] = _Peer(watches_loads, num_unread=known.num_unread if known else 0)
        self._has_newcomers = True
        self._told_version = -1
        self._report_load()

    def _on_read(self, client: bytes, count: int) -> None:
        peer = self._peers.get(client)
        if peer is not None:
            peer.num_unread = max(0, peer.num_unread - max(0, count))
            self._told_version = -1  # perhaps it was not told for a while

    def _call(self, call: messages.Call) -> messages.CallResult:
        method = self._methods.get(call.method)
        if method is None:
            known = ", ".join(sorted(name for name in self._methods if not name.startswith("_")))
            return messages.CallResult(call.call_id, error=f"unknown engine method {call.method!r}; known are {known}")
        try:
            value = method(*[msgspec.msgpack.decode(argument) for argument in call.args])
            return messages.CallResult(call.call_id, msgspec.Raw(messages.encoder.encode(value)))
        except Exception as error:  # the caller's arguments, not the engine, are at fault: tell the caller
            return messages.CallResult(call.call_id, error=f"{type(error).__name__}: {error}")

    def _process_info(self) -> dict[str, int]:
        """Of this process; num_malformed: messages that were dropped because they made no sense."""
        return {"pid": os.getpid(), "num_malformed": self.num_malformed}

    # --- what clients are told

    def _send_outputs(self) -> None:
        """Send what the last step made, while the next one is computed. And the counts, of what has arrived since, too:
        they keep others away now, not after the step."""
        made, self._outputs = self._outputs, {}
        for client, outputs in made.items():
            peer = self._peers.get(client)
            if peer is not None:
                peer.told_version = max(peer.told_version, outputs.load.version)
                is_newest = outputs.load.version == self._core.load_version  # else the shares are newer
                if peer.watches_loads and peer.reads and is_newest:
                    outputs = msgspec.structs.replace(outputs, by_client=self._shares())
            self._send(client, outputs)
        if len(self._peers) > 1:
            self._report_load()

    def _report_load(self) -> None:
        """Tell each client that does not know the newest load and has not been told one just now."""
        version = self._core.load_version
        if version == self._told_version:
            return
        now = time.monotonic()
        self._next_report = math.inf
        for client, peer in list(self._peers.items()):
            if peer.told_version == version or not peer.reads:
                continue
            if now < peer.next_report:
                self._next_report = min(self._next_report, peer.next_report)
                continue
            peer.told_version = version
            peer.next_report = now + (self._watch_interval if peer.watches_loads else messages.LOAD_INTERVAL_S)
            self._send_load(client, peer)
        if self._next_report == math.inf:
            self._told_version = version

    def _report_at_once(self) -> None:
        for peer in self._peers.values():
            peer.next_report = 0.0
        self._report_load()

    def _probe_in_time(self) -> None:
        """Find clients that are gone though there is nothing to tell them, as when their requests wait for others.

        An engine without requests finds them when the next client comes.
        """
        now = time.monotonic()
        if self._next_probe <= now:
            self._next_probe = math.inf
            for client in {*self._core.clients, *(self._peers if self._has_newcomers else ())}:
                self._send_load(client, self._peers.get(client))
            self._has_newcomers = False
        if not self._core.clients and not self._has_newcomers:
            self._next_probe = math.inf
        elif self._next_probe == math.inf:
            self._next_probe = now + _PROBE_INTERVAL_S

    def _shares(self) -> messages.Shares:
        """Everybody's share. What a client's earlier connection left behind, and is about to end, is among it."""
        shares: messages.Shares = {}
        for identity, (count, tokens) in self._core.by_client().items():
            client = identity[: messages.CLIENT_ID_SIZE]
            others, other_tokens = shares.get(client, (0, 0))
            shares[client] = (count + others, tokens + other_tokens)
        return shares

    def _send_load(self, client: bytes, peer: _Peer | None) -> None:
        watches = peer is not None and peer.watches_loads and peer.reads
        self._send(client, messages.LoadReport(self._core.load(client), self._shares() if watches else None))

    def _send(self, client: bytes, message: messages.FromEngine) -> None:
        try:
            transport.send(self._socket, client, messages.encoder.encode(message))
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._gone.add(client)  # not forgotten at once: a step may be under way with its requests
            return
        peer = self._peers.get(client)
        if peer is not None:
            peer.num_unread += 1

    def _forget(self, client: bytes) -> None:
        self._peers.pop(client, None)
        self._core.drop_client(client)
