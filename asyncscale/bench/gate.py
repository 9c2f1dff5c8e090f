"""A gate that opens when as many processes as were expected stand before it."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from asyncscale import AsyncScaleClient, run_frontends

T = TypeVar("T")

PassGate = Callable[[], Awaitable[float]]
"""Called by a front end: returns, when all are there, the common time.monotonic() at which to go on."""

_TIME = struct.Struct("!d")
_LEAD_S = 0.02  # from the last arrival to the opening: all hear of it before


async def run_together(
    main: Callable[[PassGate, AsyncScaleClient, int], Awaitable[T]],
    count: int,
    address: str,
    on_open: Callable[[], None] | None = None,
) -> list[T]:
    """Like `run_frontends`, with a gate as main's first argument, for which all front ends wait::

        async def main(pass_gate, client, index):
            start = await pass_gate()

    on_open: called here each time that the gate opens.
    """
    async with Gate(count, on_open) as gate:
        return await run_frontends(partial(_enter, main, gate.path), count, address)


async def _enter(
    main: Callable[[PassGate, AsyncScaleClient, int], Awaitable[T]], path: str, client: AsyncScaleClient, index: int
) -> T:
    async with Visitor(path) as visitor:
        return await main(visitor.pass_gate, client, index)


class Gate:
    """Opens, again and again, for `count` visitors at a time."""

    def __init__(self, count: int, on_open: Callable[[], None] | None = None) -> None:
        self._count = count
        self._on_open = on_open
        self._visitors: list[asyncio.StreamWriter] = []
        self._waiting: list[asyncio.StreamWriter] = []
        self._folder = tempfile.TemporaryDirectory(prefix="asyncscale-gate-")
        self.path = str(Path(self._folder.name) / "gate")

    async def __aenter__(self) -> Gate:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for writer in self._visitors:
            writer.close()
            with contextlib.suppress(ConnectionError):  # of a front end that was killed
                await writer.wait_closed()
        await self._server.wait_closed()
        self._folder.cleanup()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._visitors.append(writer)
        while await reader.read(1):
            self._waiting.append(writer)
            if len(self._waiting) == self._count:
                self._open()

    def _open(self) -> None:
        opens_at = time.monotonic() + _LEAD_S
        for writer in self._waiting:
            writer.write(_TIME.pack(opens_at))
        self._waiting.clear()
        if self._on_open is not None:
            asyncio.get_running_loop().call_later(_LEAD_S, self._on_open)


class Visitor:
    """A process's way through the gate."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def __aenter__(self) -> Visitor:
        self._reader, self._writer = await asyncio.open_unix_connection(self._path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def pass_gate(self) -> float:
        """Wait until all are here; the time.monotonic() of the opening, which is some milliseconds ahead."""
        self._writer.write(b".")
        (opens_at,) = _TIME.unpack(await self._reader.readexactly(_TIME.size))
        return float(opens_at)
