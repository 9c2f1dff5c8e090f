"""Two engines with modelled steps, one client, requests as they would come from the world."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from asyncscale.bench.measure import measured_replay
from asyncscale.bench.replay import RequestRecord
from asyncscale.bench.report import Report
from asyncscale.bench.sections.settings import MODEL, RATE, Settings, start_engines, trace
from asyncscale.bench.step_model import Arrivals, step_time_ratio
from asyncscale.bench.table import Row

SERVE, SERVE_10000 = "serve", "serve-10000"


async def measure(settings: Settings) -> list[Row]:
    """120 requests/s."""
    num_requests = settings.count(2000)
    async with start_engines(2) as client:
        run, report = await measured_replay(client, trace(num_requests, RATE))
        ratio = step_time_ratio(await _by_engine(run.records), MODEL)
    load = f"2 engines, 1 client, {num_requests:,} requests at {RATE:g}/s"
    return [_cpu(SERVE, load, report), *_latencies(report, ratio), _lost(SERVE, num_requests, report)]


async def measure_10000(settings: Settings) -> list[Row]:
    """All at once: most of them wait in the client for a free slot."""
    num_requests = settings.count(10_000)
    async with start_engines(2) as client:
        _, report = await measured_replay(client, trace(num_requests, math.inf))
    load = f"2 engines, 1 client, {num_requests:,} requests at once"
    return [_cpu(SERVE_10000, load, report), _lost(SERVE_10000, num_requests, report)]


async def _by_engine(records: Sequence[RequestRecord]) -> dict[int, list[Arrivals]]:
    """Asks each request for its text, so not while anything is measured."""
    by_engine: defaultdict[int, list[Arrivals]] = defaultdict(list)
    for record in records:
        if record.generation is not None and record.error is None:
            engine = (await record.generation).timing.engine
            if engine is not None:
                by_engine[engine].append(Arrivals(record.num_prompt_tokens, record.token_times_s))
    return by_engine


def _cpu(section: str, load: str, report: Report) -> Row:
    client = report.processes["client"].cpu_us_per_output_token
    engines = report.engine_cpu_us_per_output_token
    together = math.nan if client is None or engines is None else client + engines
    figures = {
        "client_us": client,
        "engines_us": engines,
        "together_us": together,
        "output_throughput": report.output_throughput,
    }
    shown = "{together_us:.1f} us (client {client_us:.1f}, engines {engines_us:.1f})"
    return Row(section, f"CPU per output token: {load}", figures, shown, "14 us, aim 7", together <= 14)


def _latencies(report: Report, ratio: float) -> list[Row]:
    p50, p99 = report.ttft_ms.median or math.nan, report.ttft_ms.p99 or math.nan
    first = Row(
        SERVE,
        "TTFT p50 / p99",
        {"ttft_p50_ms": p50, "ttft_p99_ms": p99},
        "{ttft_p50_ms:.0f} / {ttft_p99_ms:.0f} ms",
        "40 / 100 ms",
        p50 <= 40 and p99 <= 100,
    )
    each = Row(
        SERVE,
        "TPOT mean; pauses over modelled steps",
        {"tpot_ms": report.tpot_ms.mean, "step_ratio": ratio},
        "{tpot_ms:.1f} ms; {step_ratio:.3f}",
        "1.05",
        ratio <= 1.05,
    )
    return [first, each]


def _lost(section: str, num_requests: int, report: Report) -> Row:
    lost = num_requests - report.completed
    figures = {"lost": lost, "completed": report.completed, "output_throughput": report.output_throughput}
    return Row(section, "requests lost; output", figures, "{lost:.0f}; {output_throughput:,.0f} tok/s", "0", lost == 0)
