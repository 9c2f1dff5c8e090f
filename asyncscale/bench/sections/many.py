"""Sixteen engines and eight clients on one machine: the counts, and what the coordinator's process takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from asyncscale import AsyncScaleClient
from asyncscale.bench.gate import PassGate, run_together
from asyncscale.bench.replay import replay
from asyncscale.bench.sections.settings import RATE, Settings, deal, start_engines, trace
from asyncscale.bench.table import Row

SECTION = "many"

NUM_ENGINES, NUM_CLIENTS = 16, 8
_MEAN_OUT = 50
_SETTLING_S = 0.3  # after the last token anywhere: whatever counts are under way have arrived
_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Sight:
    """Of one client. Times are time.monotonic(): of its last token, and since when it saw no load anywhere."""

    num_done: int
    last_token_at: float
    zero_since: float


async def measure(settings: Settings) -> list[Row]:
    """The owner serves nothing: its process is the coordinator."""
    num_requests = settings.count(1200)
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.monotonic(), time.process_time()))

    async with start_engines(NUM_ENGINES) as owner:
        sights = await run_together(partial(play_and_watch, num_requests), NUM_CLIENTS, owner.address, mark)
    (start, cpu_before), (end, cpu_after) = marks
    return _rows(num_requests, sights, (cpu_after - cpu_before) / (end - start))


async def play_and_watch(num_requests: int, pass_gate: PassGate, client: AsyncScaleClient, index: int) -> Sight:
    """A front end: its share of the requests, then the loads until all clients have done theirs and it sees none."""
    requests = deal(trace(num_requests, RATE, _MEAN_OUT), NUM_CLIENTS, index)
    start = await pass_gate()
    run = await replay(client, requests, start=start, progress=False)
    done = [record for record in run.records if record.error is None]
    last_token_at = start + max(record.token_times_s[-1] for record in done)
    watch = LoadWatch()
    watcher = asyncio.create_task(watch.run(client))
    await pass_gate()
    await asyncio.sleep(_SETTLING_S)
    async with asyncio.timeout(_PATIENCE_S):
        zero_since = await watch.wait_zero()
    watcher.cancel()
    return Sight(len(done), last_token_at, zero_since)


class LoadWatch:
    """Since when a client has seen no load on any engine."""

    def __init__(self) -> None:
        self._zero_since = 0.0
        self._zero = asyncio.Event()

    async def run(self, client: AsyncScaleClient) -> None:
        """Watch, until cancelled."""
        async for loads in client.watch_loads():
            if any(load.in_flight or load.running or load.waiting for load in loads):
                self._zero.clear()
            elif not self._zero.is_set():
                self._zero_since = time.monotonic()
                self._zero.set()

    async def wait_zero(self) -> float:
        """The time.monotonic() since when there is none."""
        await self._zero.wait()
        return self._zero_since


def _rows(num_requests: int, sights: Sequence[Sight], owner_cpu: float) -> list[Row]:
    """owner_cpu: seconds per second."""
    load = f"{NUM_ENGINES} engines, {NUM_CLIENTS} clients, {num_requests:,} requests at {RATE:g}/s"
    lost = num_requests - sum(sight.num_done for sight in sights)
    quiet = max(sight.last_token_at for sight in sights)
    settled_ms = 1000 * max(0.0, max(sight.zero_since for sight in sights) - quiet)
    owner = 100 * owner_cpu
    return [
        Row(SECTION, f"{load}: requests lost", {"lost": lost}, "{lost:.0f}", "0", lost == 0),
        Row(
            SECTION,
            "last token of all until every client sees no load",
            {"settled_ms": settled_ms},
            "{settled_ms:.1f} ms",
            "20 ms",
            settled_ms <= 20,
        ),
        Row(
            SECTION,
            "coordinator (the owner's process)",
            {"owner_cpu_percent": owner},
            "{owner_cpu_percent:.1f} % of a core",
            "3 %",
            owner < 3,
        ),
    ]
