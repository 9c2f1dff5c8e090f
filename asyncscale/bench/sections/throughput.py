"""Engines whose step costs nothing: how many tokens the serving layer itself delivers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from asyncscale import AsyncScaleClient
from asyncscale.bench.gate import PassGate, run_together
from asyncscale.bench.sections.settings import FREE, Settings, start_engines
from asyncscale.bench.table import Row

SECTION = "throughput"

_STREAMS_PER_ENGINE = 256
_TARGET = 200_000  # tokens per second


@dataclass(frozen=True, slots=True)
class Delivery:
    """Of one client: from the common start to its last token; mean pause between two tokens of a stream, per stream."""

    num_tokens: int
    duration_s: float
    pauses_s: list[float]


@dataclass(frozen=True, slots=True)
class _Result:
    tokens_per_s: float
    pause_ms: float


async def measure(settings: Settings) -> list[Row]:
    """Clients are processes of their own; the owner of the engines serves nothing."""
    num_tokens = settings.count(8000)
    results = {
        (num_engines, num_clients): await _deliver(num_engines, num_clients, num_tokens)
        for num_engines, num_clients in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 4))
    }
    one = results[1, 1]
    rows = [_row(num_engines, num_clients, result) for (num_engines, num_clients), result in results.items()]
    return [*rows, _second_client(one, results[1, 2])]


async def _deliver(num_engines: int, num_clients: int, num_tokens: int) -> _Result:
    num_streams = _STREAMS_PER_ENGINE * num_engines // num_clients
    async with start_engines(num_engines, FREE) as owner:
        deliveries = await run_together(partial(drink, num_streams, num_tokens), num_clients, owner.address)
    return _summary(deliveries)


async def drink(
    num_streams: int, num_tokens: int, pass_gate: PassGate, client: AsyncScaleClient, index: int
) -> Delivery:
    """A front end: so many streams of so many tokens each, as fast as they come."""
    start = await pass_gate()
    await asyncio.sleep(start - time.monotonic())

    async def read(number: int) -> _Stream:
        count, first_at = 0, start
        prompt = [index, number, 1, 2]
        async for _ in client.generate(prompt, max_tokens=num_tokens, ignore_eos=True, temperature=0.0):
            count += 1
            if count == 1:
                first_at = time.monotonic()
        return _Stream(count, first_at, time.monotonic())

    streams = await asyncio.gather(*map(read, range(num_streams)))
    return Delivery(
        num_tokens=sum(stream.num_tokens for stream in streams),
        duration_s=max(stream.last_at for stream in streams) - start,
        pauses_s=[(stream.last_at - stream.first_at) / (stream.num_tokens - 1) for stream in streams],
    )


@dataclass(frozen=True, slots=True)
class _Stream:
    num_tokens: int
    first_at: float
    last_at: float


def _summary(deliveries: Sequence[Delivery]) -> _Result:
    duration = max(delivery.duration_s for delivery in deliveries)
    pauses = [pause for delivery in deliveries for pause in delivery.pauses_s]
    return _Result(sum(delivery.num_tokens for delivery in deliveries) / duration, 1000 * float(np.mean(pauses)))


def _row(num_engines: int, num_clients: int, result: _Result) -> Row:
    is_one_client = num_clients == 1
    return Row(
        SECTION,
        f"engines: {num_engines}, clients: {num_clients}, {_STREAMS_PER_ENGINE} streams per engine",
        {
            "num_engines": num_engines,
            "num_clients": num_clients,
            "tokens_per_s": result.tokens_per_s,
            "pause_ms": result.pause_ms,
        },
        "{tokens_per_s:,.0f} tok/s, {pause_ms:.2f} ms per token of a stream",
        f"{_TARGET:,} tok/s" if is_one_client else "",
        result.tokens_per_s >= _TARGET if is_one_client else None,
    )


def _second_client(one: _Result, two: _Result) -> Row:
    ratios = {"throughput_ratio": two.tokens_per_s / one.tokens_per_s, "pause_ratio": two.pause_ms / one.pause_ms}
    what = f"a second client on one engine, {os.cpu_count()} cores: throughput, time per token"
    return Row(SECTION, what, ratios, "x {throughput_ratio:.2f}, x {pause_ratio:.2f}")
