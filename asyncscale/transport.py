"""ZeroMQ sockets as both sides make them: on this host or over tcp, options, one place. No asyncio here.

On one host, sockets live in a folder of mode 0700, so that only their user can reach them. Every engine incarnation has
an address of its own, a path or a port: a message for a dead engine cannot reach its successor.

Over tcp, everything is encrypted and authenticated by CurveZMQ (https://rfc.zeromq.org/spec/26/), under one key pair
that the owner makes at start. To know its public key is what lets a client in: the server's permanent key is never
sent. Each client must know it beforehand, because its HELLO holds a box for that key, and a server ends the connection
when it cannot open that; boxes do not tell whom they are for, and there are 2**251 keys to guess from. A check of the
clients' own keys (ZAP) would add nothing, as those keys would be handed over in the same address. What the public key
does not give: to read what others send, or to pose as the owner or an engine. That takes the secret key, and for what
was sent in the past not even that is enough.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import socket as socket_module
import struct
import tempfile
from typing import Literal

import zmq
from zmq.utils import z85

from asyncscale import messages
from asyncscale.address import Address, CurveKeys, TcpBinding, parse
from asyncscale.errors import AsyncScaleError

# Plain integers: or-ing zmq's enumerations takes longer than sending.
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
_NOBLOCK, _NOBLOCK_SNDMORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

_monitor_numbers = itertools.count()
_EVENT = struct.Struct("=H")

_ZERO_COPY_RECEIVE = 10  # ZMQ_ZERO_COPY_RECV, which pyzmq has no name for

# One more than any message has.
_MAX_FRAMES = 3

# Messages of one peer that a ROUTER takes ahead of `recv`; the peer keeps the others, and so does its own memory.
_MAX_UNTAKEN = 10_000
# A peer that connects has so long to say who it is. One that was cut off over tcp is noticed after as long: by probes
# when the connection is quiet, or when what was sent is not acknowledged.
_HANDSHAKE_MS = 5000
_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_COUNT = 2, 1, 3
_UNACKNOWLEDGED_MS = 5000

# A ROUTER asks each peer so often whether it is there. The peer's I/O thread answers, also while its process computes
# or its event loop is blocked; one that is stopped or cut off does not, and after the timeout it is as if it had died.
_HEARTBEAT_INTERVAL_MS = 400
_HEARTBEAT_TIMEOUT_MS = 1000

# A DEALER's connection is made once: a second one would go on in the middle of what was lost with the first.
_NO_RECONNECT_MS = 10**9

# So many peers may connect at the same moment; the kernel may allow fewer.
_BACKLOG = 4096

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
    """Where the coordinator binds, unless over tcp."""
    return f"ipc://{folder}/coordinator"


def tcp_binding(host: str) -> TcpBinding:
    """A binding to `host`, an address or a name of this machine, with new keys. Blocks while it looks the name up.

    Bound to all interfaces (0.0.0.0, ::), it publishes the address of the one that leads out.
    Raises ValueError when the host is not of this machine.
    """
    if not zmq.has("curve"):
        raise AsyncScaleError("host= needs CURVE, and this pyzmq's libzmq was built without it; pyzmq's wheels have it")
    try:
        if not host:
            raise ValueError("it is empty")
        family, _, _, _, where = socket_module.getaddrinfo(host, 0, type=socket_module.SOCK_STREAM)[0]
        with socket_module.socket(family, socket_module.SOCK_STREAM) as probe:
            probe.bind(where)
    except (OSError, ValueError) as error:  # ValueError: no name at all
        raise ValueError(f"host must be an address or a name of this machine, got {host!r}: {error}") from None
    number = str(where[0])
    public, secret = map(z85.decode, zmq.curve_keypair())
    published = _outward_address(family) if number in ("0.0.0.0", "::") else number
    return TcpBinding(number, published, CurveKeys(public, secret))


def _outward_address(family: int) -> str:
    """Of the interface that packets to other networks leave by; of this host itself when there is none."""
    local, elsewhere = ("::1", "2001:db8::1") if family == socket_module.AF_INET6 else ("127.0.0.1", "192.0.2.1")
    with socket_module.socket(family, socket_module.SOCK_DGRAM) as probe:
        try:
            probe.connect((elsewhere, 9))  # of a datagram socket: sends nothing
        except OSError:
            return local
        return str(probe.getsockname()[0])


def is_listening(address: str) -> bool:
    """Whether a process has bound this ipc address. Over tcp, only connecting tells: True."""
    if not address.startswith("ipc://"):
        return True
    with socket_module.socket(socket_module.AF_UNIX, socket_module.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address.removeprefix("ipc://"))
        except BlockingIOError:  # more want to connect than it has let in yet
            return True
        except (OSError, ValueError):
            return False
        return True


def unlink_address(address: str) -> None:
    """Remove the socket file of an ipc address, if there is one."""
    with contextlib.suppress(OSError):
        os.unlink(address.removeprefix("ipc://"))


def make_context() -> zmq.Context[zmq.Socket[bytes]]:
    """What sockets are made of; one per client, and one per engine."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    # Else every message that waits for `recv`, however short, keeps the 8 KB that it was read with.
    context.set(_ZERO_COPY_RECEIVE, 0)
    return context


def bind_router(
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    *,
    tcp: TcpBinding | None = None,
    max_unread: int = 0,
    max_bytes: int = messages.MAX_REQUEST_BYTES,
    heartbeat: bool = False,
) -> zmq.Socket[bytes]:
    """A ROUTER at `address`, or over `tcp`, that raises EHOSTUNREACH when it sends to a peer that is gone, instead of
    dropping silently.

    max_unread: so many messages may wait for a peer; then a send raises EAGAIN. 0:
    any number. max_bytes: a peer that sends a longer frame is disconnected. (libzmq bounds no message of many frames;
    it is the peer's memory first that those fill.) heartbeat: a peer that is stopped or cut off is gone, too, after
    1.4 s; so is one that receives nothing, when it has taken all that it takes ahead of `recv`.
    """
    endpoint = address if tcp is None else tcp.endpoint
    socket = context.socket(zmq.ROUTER)
    _common(socket, endpoint, max_bytes)
    socket.setsockopt(zmq.SNDHWM, max_unread)
    socket.setsockopt(zmq.RCVHWM, _MAX_UNTAKEN)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.BACKLOG, _BACKLOG)
    if heartbeat:
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_INTERVAL_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    if tcp is not None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, tcp.keys.secret)
    socket.bind(endpoint)
    return socket


def published_address(socket: zmq.Socket[bytes], tcp: TcpBinding | None) -> str:
    """Under which address others reach a bound socket."""
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return endpoint if tcp is None else tcp.address(int(endpoint.rpartition(":")[2]))


def connect_dealer(
    context: zmq.Context[zmq.Socket[bytes]], address: str, identity: bytes, *, max_unread: int = 0
) -> zmq.Socket[bytes]:
    """A DEALER with one connection in its life. max_unread: so many messages are taken ahead of `recv`."""
    socket, endpoint = _make_dealer(context, address, identity, max_unread)
    socket.connect(endpoint)
    return socket


def connect_monitored_dealer(
    context: zmq.Context[zmq.Socket[bytes]], address: str, identity: bytes, *, max_unread: int = 0
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """Like `connect_dealer`, with its `monitor`, which misses nothing: make another when the connection is lost."""
    socket, endpoint = _make_dealer(context, address, identity, max_unread)
    events = monitor(socket)
    socket.connect(endpoint)
    return socket, events


def _make_dealer(
    context: zmq.Context[zmq.Socket[bytes]], address: str, identity: bytes, max_unread: int
) -> tuple[zmq.Socket[bytes], str]:
    """The socket, and the endpoint that it is to be connected to."""
    where = Address(address) if address.startswith("inproc://") else parse(address)
    socket = context.socket(zmq.DEALER)
    _common(socket, where.endpoint, messages.MAX_ANSWER_BYTES)
    socket.setsockopt(zmq.RCVHWM, max_unread)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.RECONNECT_IVL, _NO_RECONNECT_MS)
    if where.server_key is not None:
        _use_curve(socket, where.server_key)
    return socket, where.endpoint


_EVENT_NAMES: dict[int, Literal["connected", "disconnected", "unreachable"]] = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "connected",
    zmq.EVENT_DISCONNECTED: "disconnected",
    zmq.EVENT_CONNECT_RETRIED: "unreachable",
}
_CONNECTION_EVENTS = int(
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def monitor(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """A socket that receives what happens to the connections of another: see `connection_event`.

    Before either is closed, `socket.disable_monitor()`: else libzmq's thread may wait for ever until somebody reads,
    and every other socket with it.
    """
    # A name of our own: pyzmq names it after a descriptor, which may be that of a socket whose monitor is not gone yet.
    return socket.get_monitor_socket(_CONNECTION_EVENTS, f"inproc://monitor-{next(_monitor_numbers)}")


def connection_event(frames: list[bytes]) -> Literal["connected", "disconnected", "unreachable", "refused"]:
    """What a monitor socket tells: the handshake is done; the connection ended, perhaps before that; nobody listens; or
    somebody does, who ended the handshake, as for a wrong key. Format: zmq_socket_monitor(3).

    Unreachable comes after each end, too, when all that arrived before it is there to be received.
    """
    (event,) = _EVENT.unpack_from(frames[0])
    return _EVENT_NAMES.get(event, "refused")


def send(socket: zmq.Socket[bytes], *frames: bytes) -> None:
    """Queue a message without waiting. Raises zmq.ZMQError: EAGAIN when that would wait, EHOSTUNREACH for no peer."""
    for frame in frames[:-1]:
        socket.send(frame, _NOBLOCK_SNDMORE)
    socket.send(frames[-1], _NOBLOCK)


def receive(socket: zmq.Socket[bytes]) -> list[bytes] | None:
    """The frames of the next message that has arrived, or the first three of many; None when there is none."""
    if not may_receive(socket):  # to ask is cheaper than to catch what `recv` would raise
        return None
    frame = socket.recv(_NOBLOCK, copy=False)
    frames = [frame.bytes]
    while frame.more:
        frame = socket.recv(_NOBLOCK, copy=False)
        if len(frames) < _MAX_FRAMES:
            frames.append(frame.bytes)
    return frames


def may_receive(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message has arrived."""
    return bool(int(socket.get(_EVENTS)) & _POLLIN)


def _use_curve(socket: zmq.Socket[bytes], server_key: bytes) -> None:
    public, secret = zmq.curve_keypair()  # any will do
    socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


def _common(socket: zmq.Socket[bytes], endpoint: str, max_bytes: int) -> None:
    # Nothing waits at close; and a send never blocks: what is queued is bounded by the requests' own tokens.
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    if endpoint.startswith("tcp://"):
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_IDLE_S)
        socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _KEEPALIVE_INTERVAL_S)
        socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, _KEEPALIVE_COUNT)
        socket.setsockopt(zmq.TCP_MAXRT, _UNACKNOWLEDGED_MS)
