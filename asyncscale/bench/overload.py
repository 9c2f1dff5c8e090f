"""`python -m asyncscale.bench overload`: ten times the load there is room for: what is accepted, and what it costs."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from dataclasses import dataclass, field

import uvloop

from asyncscale import AsyncScaleClient, OverloadedError, SimulatedModel
from asyncscale.bench.measure import engine_pids
from asyncscale.bench.usage import process_usage

_MODEL = SimulatedModel(base_ms=8.0, decode_us=35.0, prefill_us=10.0)
_NUM_ENGINES, _NUM_SEQS, _MAX_QUEUED = 2, 16, 32
_PROMPT_TOKENS, _OUTPUT_TOKENS = 100, 50
# A step of 16 decoding requests, times the tokens of a request: how long a slot is taken.
_SLOT_S = _OUTPUT_TOKENS * (8.0 + 16 * 0.035) / 1000
_CAPACITY = _NUM_ENGINES * _NUM_SEQS / _SLOT_S  # requests per second


@dataclass
class _Outcome:
    """latencies: of accepted requests, seconds. memory: bytes of client and engines together, over the run."""

    latencies: list[float] = field(default_factory=list)
    num_refused: int = 0
    refusal_s: float = 0.0
    memory: list[int] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `overload`."""
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two loads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    print(
        f"{_NUM_ENGINES} engines of {_NUM_SEQS} slots, a queue of {_MAX_QUEUED}; "
        f"capacity {_CAPACITY:.0f} requests/s; {arguments.seconds:g} s each"
    )
    for factor in (0.8, 10.0):
        outcome = uvloop.run(_measure(factor * _CAPACITY, arguments.seconds, arguments.seed))
        latencies = sorted(outcome.latencies)
        p99 = latencies[int(0.99 * (len(latencies) - 1))]
        print(
            f"{factor:>4g} x: {len(latencies):,} accepted ({len(latencies) / arguments.seconds:.0f}/s), latency median "
            f"{statistics.median(latencies):.2f} s, P99 {p99:.2f} s; {outcome.num_refused:,} refused, "
            f"{1e6 * outcome.refusal_s / max(1, outcome.num_refused):.0f} us each; "
            f"memory {' -> '.join(f'{size / 2**20:.0f}' for size in outcome.memory)} MiB"
        )
    worst = _SLOT_S * (1 + _MAX_QUEUED / (_NUM_ENGINES * _NUM_SEQS))
    print(f"a request takes {_SLOT_S:.2f} s, and behind a full queue {worst:.2f} s")
    return 0


async def _measure(rate: float, seconds: float, seed: int) -> _Outcome:
    draw, outcome = random.Random(seed), _Outcome()
    async with AsyncScaleClient(
        _MODEL,
        num_engines=_NUM_ENGINES,
        max_num_seqs=_NUM_SEQS,
        max_queued_requests=_MAX_QUEUED,
        enable_prefix_caching=False,
        progress=False,
    ) as client:
        pids = await engine_pids(client)
        start = time.monotonic()
        waiting: set[asyncio.Task[None]] = set()
        due, next_look = start, start + seconds / 10
        while (now := time.monotonic()) < start + seconds:
            if now >= next_look:
                outcome.memory.append(_pss([os.getpid(), *pids]))
                next_look += seconds / 4
            while due <= now:
                due += draw.expovariate(rate)
                _ask(client, [draw.randrange(300, 30_000) for _ in range(_PROMPT_TOKENS)], outcome, waiting)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.gather(*waiting)
    return outcome


def _pss(pids: list[int]) -> int:
    """Bytes of memory of all of them together."""
    usages = [usage for usage in map(process_usage, pids) if usage is not None]
    return sum(usage.peak_rss if usage.pss is None else usage.pss for usage in usages)


def _ask(client: AsyncScaleClient, prompt: list[int], outcome: _Outcome, waiting: set[asyncio.Task[None]]) -> None:
    started = time.perf_counter()
    try:
        generation = client.generate(prompt, max_tokens=_OUTPUT_TOKENS, ignore_eos=True)
    except OverloadedError:
        outcome.num_refused += 1
        outcome.refusal_s += time.perf_counter() - started
        return

    async def finish() -> None:
        await generation
        outcome.latencies.append(time.perf_counter() - started)

    task = asyncio.ensure_future(finish())
    waiting.add(task)
    task.add_done_callback(waiting.discard)
