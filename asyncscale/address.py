"""Addresses, as text: ``ipc:///folder/name`` on this host, ``tcp://host:port/?key=...`` from any. No I/O here.

The key is the CURVE public key of an owner and its engines, 32 bytes in hex. It lets in whoever has it (see
`asyncscale.transport`): so it is in no repr, log or error, for which there is `shown`.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

KEY_BYTES = 32
_MAX_IPC_PATH = 107  # sockaddr_un's
# Hosts are numbers: to look a name up, libzmq would hold up all the process's sockets.
_TCP = re.compile(r"(tcp://(\[[0-9a-fA-F:.]{2,45}\]|[0-9.]{7,15}):([0-9]{1,5}))/\?key=([0-9a-fA-F]{64})")
_KEY_LIKE = re.compile(r"[0-9a-zA-Z_+/=-]{20,}")
_EXPECTED = "ipc:///path/of/socket, or tcp://10.0.0.1:port/?key= and 64 hex digits"


@dataclass(frozen=True)
class Address:
    """endpoint: for ZeroMQ. server_key: for tcp, 32 bytes; None for ipc."""

    endpoint: str
    server_key: bytes | None = field(default=None, repr=False)


class CurveKeys(msgspec.Struct, frozen=True):
    """The key pair of an owner and its engines, 32 bytes each."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return "CurveKeys(...)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class TcpBinding(msgspec.Struct, frozen=True):
    """Where an owner and its engines listen: each at a free port of `host`, a number, which others know as `published`.
    keys: of them all."""

    host: str
    published: str
    keys: CurveKeys

    @property
    def endpoint(self) -> str:
        return f"tcp://{_bracketed(self.host)}:*"

    def address(self, port: int) -> str:
        """What others connect to."""
        return f"tcp://{_bracketed(self.published)}:{port}/?key={self.keys.public.hex()}"


def parse(address: object) -> Address:
    """Raises ValueError, which says what is expected and shows no key."""
    if isinstance(address, str):
        path = address.removeprefix("ipc://")
        if path != address and path.isprintable() and 0 < len(path.encode()) <= _MAX_IPC_PATH:
            return Address(address)
        match = _TCP.fullmatch(address)
        if match is not None and _is_number(match[2].strip("[]")) and 0 < int(match[3]) < 2**16:
            return Address(match[1], bytes.fromhex(match[4]))
    raise ValueError(f"address must be what another client's .address gave ({_EXPECTED}), got {_describe(address)}")


def shown(address: str) -> str:
    """The address without its key, for people and logs."""
    endpoint, separator, _ = address.partition("?")
    return f"{endpoint}?key=..." if separator else endpoint


def _describe(address: object) -> str:
    if not isinstance(address, str):
        return f"a {type(address).__name__}"
    if address.startswith("ipc://"):
        return repr(address if len(address) <= 200 else address[:200] + "...")
    return repr(_KEY_LIKE.sub("...", shown(address)))  # it may be a key alone, or what is left of an address


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
