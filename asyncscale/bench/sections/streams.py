"""Many streams at once on one client: what each costs in memory, and what that does to a token."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from asyncscale import AsyncScaleClient, SimulatedModel
from asyncscale.bench.gate import PassGate, run_together
from asyncscale.bench.measure import engine_pids, total_cpu_seconds
from asyncscale.bench.sections.settings import Settings, start_engines
from asyncscale.bench.table import Row
from asyncscale.bench.usage import process_usage

SECTION = "streams"

_MODEL = SimulatedModel(base_ms=20, decode_us=0, prefill_us=0, max_model_len=1024, num_kv_blocks=300_000)
_MAX_NUM_SEQS = 8192
_MAX_TOKENS = 800
_PROMPT_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Costs:
    """memory_bytes: per stream when each has had a token or more; NaN where it is not kept. CPU: per token after it."""

    num_streams: int
    memory_bytes: float
    client_cpu_us: float
    engines_cpu_us: float

    @property
    def cpu_us(self) -> float:
        return self.client_cpu_us + self.engines_cpu_us


async def measure(settings: Settings) -> list[Row]:
    """100, 1,000 and 10,000 streams, each size in a new process with nothing else to do."""
    costs = []
    async with start_engines(2, _MODEL, _MAX_NUM_SEQS) as owner:
        for num_streams in (100, 1000, 10_000):
            hold = partial(hold_streams, settings.count(num_streams), settings.seconds(4.0))
            costs += await run_together(hold, 1, owner.address)
    return [*(_row(each) for each in costs), _growth(costs)]


async def hold_streams(
    num_streams: int, window_s: float, pass_gate: PassGate, client: AsyncScaleClient, index: int
) -> Costs:
    """The front end: reads all streams at once, token by token, for so many seconds after the slowest one's first."""
    engines = await engine_pids(client)
    num_tokens = num_live = 0
    all_live = asyncio.Event()

    async def read(number: int) -> None:
        nonlocal num_tokens, num_live
        prompt = [number >> 8, number & 255] * (_PROMPT_LENGTH // 2)
        async for token in client.generate(prompt, max_tokens=_MAX_TOKENS, ignore_eos=True, temperature=0.0):
            num_tokens += 1
            if token.index == 0:
                num_live += 1
                if num_live == num_streams:
                    all_live.set()

    gc.collect()
    memory = _memory_bytes()
    readers = [asyncio.create_task(read(number)) for number in range(num_streams)]
    await all_live.wait()
    memory = (_memory_bytes() - memory) / num_streams
    num_before, client_cpu, engines_cpu = num_tokens, time.process_time(), total_cpu_seconds(engines)
    await asyncio.sleep(window_s)
    num_read = num_tokens - num_before
    client_cpu, engines_cpu = time.process_time() - client_cpu, total_cpu_seconds(engines) - engines_cpu
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    return Costs(num_streams, memory, 1e6 * client_cpu / num_read, 1e6 * engines_cpu / num_read)


def _memory_bytes() -> float:
    usage = process_usage(os.getpid())
    return math.nan if usage is None or usage.pss is None else usage.pss


def _row(costs: Costs) -> Row:
    return Row(
        SECTION,
        f"{costs.num_streams:,} streams, 2 engines: memory each, with its reader; CPU per token",
        {
            "num_streams": costs.num_streams,
            "memory_kib": costs.memory_bytes / 1024,
            "client_cpu_us": costs.client_cpu_us,
            "engines_cpu_us": costs.engines_cpu_us,
        },
        "{memory_kib:.1f} KiB; client {client_cpu_us:.1f} us, engines {engines_cpu_us:.1f} us",
        "10 KB",
        costs.memory_bytes < 10_000,
    )


def _growth(costs: Sequence[Costs]) -> Row:
    few, many = costs[0], costs[-1]
    ratio = many.cpu_us / few.cpu_us
    what = f"CPU per token at {many.num_streams:,} streams over that at {few.num_streams:,}"
    return Row(SECTION, what, {"cpu_ratio": ratio}, "x {cpu_ratio:.2f}", "x 1.20", ratio <= 1.2)
