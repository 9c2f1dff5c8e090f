"""Notices that a DEALER's connection has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

from asyncscale import transport
from asyncscale.client.loop_socket import LoopSocket

# Whoever watches the other side's process, or is told of its end in words, shall be the first to say what happened.
GRACE_S = 0.02


class LossMonitor:
    """Calls `on_loss` once, a moment after the connection of a DEALER has ended or could not be made.

    All that arrived before the end can then be received. Close it before the socket. events: the DEALER's monitor.
    was_connected: whether there was a connection.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: zmq.Socket[bytes],
        events: zmq.Socket[bytes],
        on_loss: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._on_loss = on_loss
        self._timer: asyncio.TimerHandle | None = None
        self.was_connected = False
        self._monitor = LoopSocket(loop, events, self._on_event)

    def close(self) -> None:
        """Call nobody any more. Safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._monitor.close()

    def cut(self) -> None:
        """Break the connection. It is lost like any other."""
        self._socket.disconnect(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._on_unreachable()

    def _on_event(self, frames: list[bytes]) -> None:
        event = transport.connection_event(frames)
        if event == "connected":
            self.was_connected = True
        elif event == "unreachable":
            self._on_unreachable()

    def _on_unreachable(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(GRACE_S, self._on_loss)
