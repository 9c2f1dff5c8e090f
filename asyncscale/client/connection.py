"""A client's DEALER to one engine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
from collections.abc import Callable, Sequence

import msgspec
import zmq

from asyncscale import messages, progress, transport
from asyncscale.client.loop_socket import LoopSocket
from asyncscale.client.loss_monitor import LossMonitor
from asyncscale.errors import EngineDeadError, EngineError


class EngineConnection:
    """Sends an engine what this client wants of it, and `on_message` what it says (None for what makes no sense).
    Usable at once.

    It is made once, under an identity of its own: with its end the engine drops all that came over it. `on_loss` is
    called a moment after the end, which need not be the engine's: a client that was stopped or cut off for more than a
    second is taken for dead. Then close this one, and open another.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        client_id: bytes,
        member: messages.Member,
        on_message: Callable[[EngineConnection, messages.FromEngine | None], None],
        on_loss: Callable[[EngineConnection], None],
    ) -> None:
        self.member = member
        self.engine_id = member.engine_id
        self._progress_path = member.progress_path
        self.vocab_size = member.facts.vocab_size
        self.identity = client_id + os.urandom(messages.CONNECTION_ID_SIZE)
        self._num_read = 0
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, asyncio.Future[messages.EngineResult]] = {}
        self._call_ids = itertools.count()
        socket, events = transport.connect_monitored_dealer(context, member.address, self.identity)
        self._loss_monitor = LossMonitor(self._loop, socket, events, lambda: on_loss(self))
        self._socket = LoopSocket(self._loop, socket, self._on_frames)

    def send(self, message: messages.ToEngine) -> None:
        """Queue a message; it goes out as soon as the engine is there."""
        with contextlib.suppress(zmq.Again):  # what is at its address is no engine, and libzmq gave up on it
            self._socket.send(messages.encoder.encode(message))

    def connect(self, watch_loads: bool) -> None:
        """Introduce this client, or change what it wants to know."""
        self.send(messages.Connect(messages.PROTOCOL_VERSION, watch_loads))

    def call(self, method: str, args: Sequence[msgspec.Raw]) -> asyncio.Future[messages.EngineResult]:
        """Ask the engine to run a registered method: sent when this returns, answered when the future is done."""
        call_id = next(self._call_ids)
        self.send(messages.Call(call_id, method, list(args)))
        future: asyncio.Future[messages.EngineResult] = self._loop.create_future()
        self._calls[call_id] = future
        future.add_done_callback(lambda _: self._calls.pop(call_id, None))  # also when nobody waits for it any more
        return future

    @property
    def is_for_nobody(self) -> bool:
        """Whether the engine is gone from its address, as far as that can be told now that the connection is lost."""
        is_local = self.member.address.startswith("ipc://")
        return not transport.is_listening(self.member.address) if is_local else not self._loss_monitor.was_connected

    @property
    def last_step_began(self) -> float:
        """When the engine began its last step, also after its death, by the monotonic clock; infinity if unknown."""
        seen = None if self._progress_path is None else progress.look(self._progress_path)
        if seen is None:
            return math.inf
        return 0.0 if seen.step_began is None else seen.step_began

    def drain(self) -> None:
        """Take everything that has arrived, now."""
        self._socket.drain()

    def cut(self) -> None:
        """Break the connection, as a network does: for tests."""
        self._loss_monitor.cut()

    def leave(self) -> None:
        """Have the engine forget this client."""
        self.send(messages.Disconnect())

    def close(self, error: Exception) -> None:
        """Close the socket. Calls without an answer are answered with `error`, if an EngineError, or end with it."""
        for future in self._calls.values():
            if future.done():
                continue
            if isinstance(error, EngineError):
                died = isinstance(error, EngineDeadError)
                future.set_result(messages.EngineResult(self.engine_id, error=str(error), died=died))
            else:
                future.set_exception(error)
        self._loss_monitor.close()
        self._socket.close()

    def _on_frames(self, frames: list[bytes]) -> None:
        self._num_read += 1
        if self._num_read == messages.READ_INTERVAL:
            self._num_read = 0
            self.send(messages.Read(messages.READ_INTERVAL))
        message = messages.decode(messages.from_engine_decoder, frames[0]) if len(frames) == 1 else None
        match message:
            case messages.CallResult(call_id, value, error):
                future = self._calls.get(call_id)
                if future is not None and not future.done():
                    future.set_result(messages.EngineResult(self.engine_id, value, error))
            case _:
                self._on_message(self, message)
