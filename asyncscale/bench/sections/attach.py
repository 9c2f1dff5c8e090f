"""How long a newcomer takes to be ready while the engines are busy."""

from __future__ import annotations

import asyncio
import time

from asyncscale import AsyncScaleClient, run_frontends
from asyncscale.bench.report import Statistics
from asyncscale.bench.sections.settings import Settings, start_engines
from asyncscale.bench.table import Row

SECTION = "attach"

_NUM_STREAMS, _NUM_TIMES = 200, 20


async def measure(settings: Settings) -> list[Row]:
    """The owner reads 200 streams; one other process, which has all it needs imported, attaches 20 times."""
    async with start_engines(2) as owner, asyncio.TaskGroup() as group:
        readers = [group.create_task(_read(owner, number)) for number in range(settings.count(_NUM_STREAMS))]
        [times] = await run_frontends(attach_repeatedly, 1, owner.address)
        for reader in readers:
            reader.cancel()
    statistics = Statistics.of(times)
    worst = 1000 * max(times)
    return [
        Row(
            SECTION,
            f"attach, {len(times)} times, while the owner reads {len(readers)} streams: median, worst",
            {"attach_median_ms": statistics.median, "attach_max_ms": worst},
            "{attach_median_ms:.1f} ms, {attach_max_ms:.1f} ms",
            "20 ms",
            worst < 20,
        )
    ]


async def _read(client: AsyncScaleClient, number: int) -> None:
    while True:
        async for _ in client.generate([number, 1, 2, 3], max_tokens=1000, ignore_eos=True, temperature=0.0):
            pass


async def attach_repeatedly(client: AsyncScaleClient, index: int) -> list[float]:
    """A front end: seconds until each of its further clients was ready."""
    times = []
    for _ in range(_NUM_TIMES):
        start = time.monotonic()
        async with AsyncScaleClient.attach(client.address):
            times.append(time.monotonic() - start)
    return times
