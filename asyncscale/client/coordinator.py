"""Streams membership and load counts to every attached client, from within the owner's event loop."""

from __future__ import annotations

import asyncio

import msgspec
import zmq

from asyncscale import messages, transport
from asyncscale.client.loop_socket import LoopSocket
from asyncscale.config import ModelSource

# Counts that change together go out together: one message per client per so many seconds at the most.
_PUBLISH_INTERVAL_S = 0.001

_NO_LOAD = messages.Load(
    version=0, running=0, waiting=0, mine=0, tokens=0, my_tokens=0, used_blocks=0, num_blocks=0
)


class Coordinator:
    """Keeps the members and their newest loads; a client that attaches gets both at once, and every change after that.

    Each client is sent its own share in the counts (`Load.mine`), so the same report means something else to each.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: str, model: ModelSource) -> None:
        self.address = transport.coordinator_address(folder)
        self._loop = asyncio.get_running_loop()
        self._model = model
        self._members: dict[int, messages.Member] = {}
        self._reports: dict[int, messages.LoadReport] = {}
        self._clients: set[bytes] = set()
        self._changed: set[int] = set()
        self._publishing: asyncio.TimerHandle | None = None
        self._socket = LoopSocket(self._loop, transport.bind_router(context, self.address), self._on_frames)
        self.num_malformed = 0

    def join(self, member: messages.Member) -> None:
        """An engine takes requests from now on."""
        self._members[member.engine_id] = member
        for client in list(self._clients):
            self._send(client, messages.Joined(member))

    def leave(self, engine_id: int, reason: str, exit_code: int | None) -> None:
        """An engine is gone."""
        member = self._members.pop(engine_id, None)
        self._reports.pop(engine_id, None)
        self._changed.discard(engine_id)
        if member is not None:
            for client in list(self._clients):
                self._send(client, messages.Left(engine_id, member.incarnation, reason, exit_code))

    def on_load_report(self, engine_id: int, report: messages.LoadReport) -> None:
        """An engine's counts changed."""
        self._reports[engine_id] = report
        if not self._clients:
            return
        self._changed.add(engine_id)
        if self._publishing is None:
            self._publishing = self._loop.call_later(_PUBLISH_INTERVAL_S, self._publish)

    def close(self) -> None:
        """Tell every client that the engines end, and close the socket. Idempotent."""
        for client in list(self._clients):
            self._send(client, messages.Farewell())
        self._clients.clear()
        if self._publishing is not None:
            self._publishing.cancel()
        self._socket.close()

    def _publish(self) -> None:
        self._publishing = None
        changed, self._changed = self._changed, set()
        for client in list(self._clients):
            loads = [(engine_id, self._load_for(client, engine_id)) for engine_id in changed]
            self._send(client, messages.Counts(loads))

    def _load_for(self, client: bytes, engine_id: int) -> messages.Load:
        report = self._reports.get(engine_id)
        if report is None:
            return _NO_LOAD
        mine, my_tokens = report.by_client.get(client, (0, 0))
        return msgspec.structs.replace(report.load, mine=mine, my_tokens=my_tokens)

    def _on_frames(self, frames: list[bytes]) -> None:
        client = frames[0]
        match messages.decode(messages.to_coordinator_decoder, frames[1]) if len(frames) == 2 else None:
            case None:
                self.num_malformed += 1
            case messages.Attach(version):
                if version == messages.PROTOCOL_VERSION:
                    self._clients.add(client)
                self._send(client, self._welcome(client))
            case messages.Detach():
                self._clients.discard(client)

    def _welcome(self, client: bytes) -> messages.Welcome:
        members = [
            msgspec.structs.replace(member, load=self._load_for(client, engine_id))
            for engine_id, member in sorted(self._members.items())
        ]
        return messages.Welcome(messages.PROTOCOL_VERSION, self._model, members)

    def _send(self, client: bytes, message: messages.FromCoordinator) -> None:
        try:
            self._socket.send(client, messages.encoder.encode(message))
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._clients.discard(client)
