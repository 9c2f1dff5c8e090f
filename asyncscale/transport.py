"""ZeroMQ sockets as both sides make them: addresses on this host, options, one place. No asyncio here.

Sockets live in a folder of mode 0700, so that only their user can reach them. Every engine incarnation has a path of
its own: an address is never bound twice, and a message for a dead engine cannot reach its successor.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket as socket_module
import tempfile

import zmq

# Plain integers: or-ing zmq's enumerations takes longer than sending.
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
_NOBLOCK, _NOBLOCK_SNDMORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

# The longest path that fits sockaddr_un with room for the socket's own name.
_MAX_FOLDER = 80


def choose_runtime_folder() -> str:
    """A new name for a private folder of sockets and engine logs, with a path short enough for a Unix socket."""
    name = f"asyncscale-{secrets.token_hex(8)}"
    folder = os.path.join(tempfile.gettempdir(), name)
    return folder if len(folder) <= _MAX_FOLDER else os.path.join("/tmp", name)


def make_runtime_folder(folder: str) -> None:
    """Make the folder that was chosen, with mode 0700. To be done when there is somebody who will remove it."""
    os.mkdir(folder, 0o700)


def remove_runtime_folder(folder: str) -> None:
    """Remove the folder and what is in it; not an error when it is gone or half gone."""
    removed = f"{folder}.removed"
    with contextlib.suppress(OSError):
        os.rename(folder, removed)  # first, so that a process which is just starting makes no more files in it
    shutil.rmtree(removed, ignore_errors=True)


def coordinator_address(folder: str) -> str:
    """Where the coordinator binds: what clients attach to."""
    return f"ipc://{folder}/coordinator"


def progress_path(address: str) -> str | None:
    """Where the engine with this address shows its progress (see `asyncscale.progress`); None on another host."""
    return f"{address.removeprefix('ipc://')}.progress" if address.startswith("ipc://") else None


def is_listening(address: str) -> bool:
    """Whether a process has bound this ipc address; False for what is no address at all."""
    with socket_module.socket(socket_module.AF_UNIX, socket_module.SOCK_STREAM) as probe:
        try:
            probe.connect(address.removeprefix("ipc://"))
        except (OSError, ValueError):
            return False
        return True


def unlink_address(address: str) -> None:
    """Remove the socket file of an ipc address."""
    with contextlib.suppress(OSError):
        os.unlink(address.removeprefix("ipc://"))


def bind_router(context: zmq.Context[zmq.Socket[bytes]], address: str, *, max_unread: int = 0) -> zmq.Socket[bytes]:
    """A ROUTER that raises EHOSTUNREACH when it sends to a peer that is gone, instead of dropping silently.

    max_unread: so many messages may wait for a peer; then a send raises EAGAIN. 0: any number.
    """
    socket = context.socket(zmq.ROUTER)
    _common(socket)
    socket.setsockopt(zmq.SNDHWM, max_unread)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.bind(address)
    return socket


def connect_dealer(
    context: zmq.Context[zmq.Socket[bytes]], address: str, identity: bytes, *, max_unread: int = 0
) -> zmq.Socket[bytes]:
    """A DEALER under the client's identity. max_unread: so many messages are taken from the peer ahead of `recv`."""
    socket = context.socket(zmq.DEALER)
    _common(socket)
    socket.setsockopt(zmq.RCVHWM, max_unread)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.connect(address)
    return socket


def send(socket: zmq.Socket[bytes], *frames: bytes) -> None:
    """Queue a message without waiting. Raises zmq.ZMQError: EAGAIN when that would wait, EHOSTUNREACH for no peer."""
    for frame in frames[:-1]:
        socket.send(frame, _NOBLOCK_SNDMORE)
    socket.send(frames[-1], _NOBLOCK)


def receive(socket: zmq.Socket[bytes]) -> list[bytes] | None:
    """The frames of the next message that has arrived; None when there is none."""
    if not may_receive(socket):  # to ask is cheaper than to catch what `recv` would raise
        return None
    frame = socket.recv(_NOBLOCK, copy=False)
    frames = [frame.bytes]
    while frame.more:
        frame = socket.recv(_NOBLOCK, copy=False)
        frames.append(frame.bytes)
    return frames


def may_receive(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message has arrived."""
    return bool(int(socket.get(_EVENTS)) & _POLLIN)


def _common(socket: zmq.Socket[bytes]) -> None:
    # Nothing waits at close; and a send never blocks: what is queued is bounded by the requests' own tokens.
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
