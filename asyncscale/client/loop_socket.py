"""A ZeroMQ socket read by the event loop: one wake-up per burst of messages, not one future per message."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable

import zmq

from asyncscale import transport

# So many messages are taken in one go before other callbacks of the loop get their turn.
_BURST = 256
_LINGER_MS = 100


class LoopSocket:
    """Calls `on_frames` with each message that `socket` receives. Owns the socket.

    libzmq's descriptor is edge-triggered: it signals once that something changed, and any receive or send may use that
    signal up. So after either, EVENTS is looked at again before the loop goes back to sleep.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[bytes], on_frames: Callable[[list[bytes]], None]
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._on_frames = on_frames
        self._wakeup: asyncio.Handle | None = None
        self._closed = False
        self._forked = False
        _open.add(self)
        self._descriptor: int = socket.get(zmq.FD)  # type: ignore[assignment]
        loop.add_reader(self._descriptor, self._read)
        self._read_soon()

    def send(self, *frames: bytes) -> None:
        """Queue a message. Raises zmq.ZMQError (EHOSTUNREACH) when a ROUTER's peer is gone. In a fork, does nothing."""
        if self._forked:
            return
        try:
            transport.send(self._socket, *frames)
        finally:  # one that failed may have used the signal up as well
            if self._wakeup is None and transport.may_receive(self._socket):
                self._read_soon()

    def drain(self) -> None:
        """Take everything that has arrived, now."""
        while not self._closed and self._take_burst():
            pass

    def close(self) -> None:
        """Stop reading and close the socket; what was sent before still goes out, for a moment. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        if not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
        if self._wakeup is not None:
            self._wakeup.cancel()
        self._socket.close(linger=_LINGER_MS)

    def _read_soon(self) -> None:
        self._wakeup = self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._wakeup = None
        if not self._closed and self._take_burst():
            self._read_soon()

    def _take_burst(self) -> bool:
        """Whether more may be waiting."""
        for _ in range(_BURST):
            try:
                frames = transport.receive(self._socket)
                if frames is None:
                    return False
                self._on_frames(frames)
            except BaseException:  # also one that a signal's handler raises here
                self._read_soon()  # the signal for what is left is used up
                raise
            if self._closed:
                return False
        return True


_open: weakref.WeakSet[LoopSocket] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a fork, sockets and the event loop's descriptors are those of the parent, which goes on using them."""
    for socket in list(_open):
        socket._closed = socket._forked = True


os.register_at_fork(after_in_child=_leave_to_parent)
