"""The experiment that began it all: one and two front ends before one and two engines."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from asyncscale import AsyncScaleClient
from asyncscale.bench.gate import PassGate, run_together
from asyncscale.bench.replay import replay
from asyncscale.bench.sections.settings import RATE, Settings, deal, start_engines, trace
from asyncscale.bench.table import Row

SECTION = "seed"

# vLLM pull request 17546, two engines at 120 requests/s: clients -> (mean TTFT in ms, output tokens/s).
PUBLISHED = {1: (13_176.0, 15_258.0), 2: (67.5, 17_073.0)}


@dataclass(frozen=True, slots=True)
class Share:
    """What one client saw of the run. Times in seconds; duration from the common start to its last token."""

    num_tokens: int
    num_failed: int
    ttft_s: list[float]
    tpot_s: list[float]
    duration_s: float
    cpu_s: float


async def measure(settings: Settings) -> list[Row]:
    """Clients are processes of their own; the owner of the engines serves nothing."""
    num_requests = settings.count(1000)
    rows: list[Row] = []
    for num_engines in (2, 1):
        for num_clients in (1, 2):
            for rate in (RATE, math.inf):
                async with start_engines(num_engines) as owner:
                    play = partial(play_share, num_requests, rate, num_clients)
                    shares = await run_together(play, num_clients, owner.address)
                rows.append(_row(num_engines, num_clients, rate, shares))
    return [*rows, _second_client(rows)]


async def play_share(
    num_requests: int, rate: float, num_clients: int, pass_gate: PassGate, client: AsyncScaleClient, index: int
) -> Share:
    """A front end: its part of the trace, from the common start on."""
    requests = deal(trace(num_requests, rate), num_clients, index)
    start = await pass_gate()
    cpu_s = time.process_time()
    run = await replay(client, requests, start=start, progress=False)
    cpu_s = time.process_time() - cpu_s
    done = [record for record in run.records if record.error is None]
    times = [record.token_times_s for record in done]
    return Share(
        num_tokens=sum(map(len, times)),
        num_failed=len(run.records) - len(done),
        ttft_s=[record.token_times_s[0] - record.arrival_s for record in done],
        tpot_s=[(t[-1] - t[0]) / (len(t) - 1) for t in times],
        duration_s=max((t[-1] for t in times), default=math.nan),
        cpu_s=cpu_s,
    )


def _row(num_engines: int, num_clients: int, rate: float, shares: Sequence[Share]) -> Row:
    duration = max(share.duration_s for share in shares)
    ttft = 1000 * float(np.mean([value for share in shares for value in share.ttft_s]))
    throughput = sum(share.num_tokens for share in shares) / duration
    at_rate = not math.isinf(rate)
    published = PUBLISHED[num_clients] if num_engines == 2 and at_rate else None
    figures = {
        "num_engines": num_engines,
        "num_clients": num_clients,
        "rate": rate if at_rate else None,
        "ttft_mean_ms": ttft,
        "output_throughput": throughput,
        "tpot_mean_ms": 1000 * float(np.mean([value for share in shares for value in share.tpot_s])),
        "client_cpu_percent": 100 * sum(share.cpu_s for share in shares) / duration,
        "num_failed": sum(share.num_failed for share in shares),
        "published_ttft_mean_ms": published and published[0],
        "published_output_throughput": published and published[1],
    }
    return Row(
        SECTION,
        f"{_plural(num_engines, 'engine')}, {_plural(num_clients, 'client')}, "
        + (f"{rate:g} requests/s" if at_rate else "all at once"),
        figures,
        "TTFT {ttft_mean_ms:,.0f} ms, {output_throughput:,.0f} tok/s, TPOT {tpot_mean_ms:.1f} ms, "
        "clients {client_cpu_percent:.0f} % of a core",
        f"published: {published[0]:,g} ms, {published[1]:,g} tok/s" if published else "",
    )


def _second_client(rows: Sequence[Row]) -> Row:
    """On one engine that is saturated: what it costs to be two."""
    one, two = (row.figures for row in rows if row.figures["num_engines"] == 1 and row.figures["rate"] is None)
    throughput, tpot = (
        (two[name] or math.nan) / (one[name] or math.nan) for name in ("output_throughput", "tpot_mean_ms")
    )
    return Row(
        SECTION,
        "a second client on one engine, all at once: throughput, TPOT",
        {"throughput_ratio": throughput, "tpot_ratio": tpot},
        "x {throughput_ratio:.3f}, x {tpot_ratio:.3f}",
        "no loss",
        throughput >= 0.98 and tpot <= 1.02,
    )


def _plural(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
