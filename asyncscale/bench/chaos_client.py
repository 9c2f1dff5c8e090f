"""An attached client of the chaos run, as a program of its own: told what to do on stdin, tells its tally on stdout."""

from __future__ import annotations

import asyncio
import sys
from typing import TypeVar

import msgspec
import uvloop

from asyncscale import AsyncScaleClient
from asyncscale.bench.chaos_requests import Catalogue, Load, Tally

_TELL_INTERVAL_S = 0.25

Stream = TypeVar("Stream", asyncio.StreamReader, asyncio.StreamWriter)


class Orders(msgspec.Struct):
    """The first line on stdin; the end of stdin ends the run. expected: of `Catalogue.expect`."""

    address: str
    catalogue_seed: int
    seed: int
    num_in_flight: int
    expected: list[bytes]


class ChaosClient:
    """The program as whoever started it sees it. tally: the newest that it told."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.tally = Tally()
        self._process = process
        self._following = asyncio.ensure_future(self._follow())

    @property
    def pid(self) -> int:
        return self._process.pid

    async def end(self) -> None:
        """Let it finish what it has in flight, and return when it is gone."""
        _pipe(self._process.stdin).close()
        await self._following
        await self._process.wait()

    async def _follow(self) -> None:
        while line := await _pipe(self._process.stdout).readline():
            if line.endswith(b"\n"):  # else it was killed in the middle of it
                self.tally = msgspec.json.decode(line, type=Tally)


async def start_client(orders: Orders) -> ChaosClient:
    """Start the program and tell it what to do."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**24
    )
    _pipe(process.stdin).write(msgspec.json.encode(orders) + b"\n")
    return ChaosClient(process)


def _pipe(stream: Stream | None) -> Stream:
    if stream is None:
        raise RuntimeError("a process that was started with pipes has none")
    return stream


async def _main() -> None:
    orders = msgspec.json.decode(sys.stdin.readline(), type=Orders)
    async with AsyncScaleClient.attach(orders.address) as client:
        load = Load(client, Catalogue(orders.catalogue_seed), orders.expected, orders.seed)
        running = asyncio.ensure_future(load.run(orders.num_in_flight))
        telling = asyncio.ensure_future(_tell(load))
        await asyncio.to_thread(sys.stdin.read)
        load.stop()
        await running
        telling.cancel()
    _say(load.tally)


async def _tell(load: Load) -> None:
    while True:
        await asyncio.sleep(_TELL_INTERVAL_S)
        _say(load.tally)


def _say(tally: Tally) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(tally) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(_main())
