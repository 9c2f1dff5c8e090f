"""What client and engines use while nobody asks for anything."""

from __future__ import annotations

import asyncio
import time

from asyncscale.bench.measure import engine_pids, total_cpu_seconds
from asyncscale.bench.sections.settings import Settings, start_engines
from asyncscale.bench.table import Row

SECTION = "idle"

_NUM_ENGINES = 4
_WARM_UP_S = 0.5
_NOTHING_MS = 0.5  # per second, of the client and of each engine


async def measure(settings: Settings) -> list[Row]:
    """Five seconds."""
    duration = settings.seconds(5.0)
    async with start_engines(_NUM_ENGINES) as client:
        engines = await engine_pids(client)
        await asyncio.sleep(_WARM_UP_S)
        client_cpu, engines_cpu = time.process_time(), total_cpu_seconds(engines)
        await asyncio.sleep(duration)
        client_cpu, engines_cpu = time.process_time() - client_cpu, total_cpu_seconds(engines) - engines_cpu
    figures = {"client_ms_per_s": 1000 * client_cpu / duration, "engines_ms_per_s": 1000 * engines_cpu / duration}
    return [
        Row(
            SECTION,
            f"CPU of a client and of its {_NUM_ENGINES} engines together",
            figures,
            "{client_ms_per_s:.2f} and {engines_ms_per_s:.2f} ms per second",
            "not measurable",
            figures["client_ms_per_s"] < _NOTHING_MS and figures["engines_ms_per_s"] < _NUM_ENGINES * _NOTHING_MS,
        )
    ]
