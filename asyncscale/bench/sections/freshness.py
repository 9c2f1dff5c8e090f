"""How long one client's requests take to show in another client's table of loads."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from asyncscale import AsyncScaleClient, Generation
from asyncscale.bench.gate import PassGate, run_together
from asyncscale.bench.report import Statistics
from asyncscale.bench.sections.settings import Settings, start_engines
from asyncscale.bench.table import Row

SECTION = "freshness"

_NUM_ENGINES = 2
_INTERVAL_S = 0.01
_MARGIN_S = 0.3  # before the first change and after the last
_TARGET_MS = 2.0
# So long that the tokens of two requests aboard are never those of one.
_SHORTEST_PROMPT = 300


@dataclass(frozen=True, slots=True)
class Moment:
    """At that time.monotonic(), an engine's requests together had, or were seen to have, so many tokens."""

    time_s: float
    engine: int
    tokens: int


async def measure(settings: Settings) -> list[Row]:
    """One client makes 100 changes per second, another one watches; the owner serves nothing."""
    num_changes = settings.count(600)
    blocked_s = num_changes * _INTERVAL_S + 2 * _MARGIN_S
    async with start_engines(_NUM_ENGINES) as owner:
        stepping = await _lags(owner, num_changes)
        await owner.collective_rpc("pause")  # without steps engines look up at once: what is left is the way itself
        between = await _lags(owner, num_changes)
        blocked = await _lags(owner, num_changes, lambda: time.sleep(blocked_s))
    return [
        _row("send to sight, 100 changes/s, engines between steps", between, _TARGET_MS),
        _row("the same, engines in 8 ms steps (they look up at the end of each)", stepping),
        _row("the same, engines between steps, owner's event loop blocked", blocked),
    ]


async def _lags(owner: AsyncScaleClient, num_changes: int, on_open: Callable[[], None] | None = None) -> list[float]:
    changes, sights = await run_together(partial(change_or_watch, num_changes), 2, owner.address, on_open)
    return lags(changes, sights)


async def change_or_watch(num_changes: int, pass_gate: PassGate, client: AsyncScaleClient, index: int) -> list[Moment]:
    """Front end 0 makes changes, front end 1 notes what it sees."""
    start = await pass_gate() + _MARGIN_S
    if index == 0:
        return await _change(client, num_changes, start)
    return await _watch(client, start + num_changes * _INTERVAL_S + _MARGIN_S)


async def _change(client: AsyncScaleClient, num_changes: int, start: float) -> list[Moment]:
    """Start a request and end the one before it on the same engine, in turn: no two changes give the same tokens."""
    changes: list[Moment] = []
    generations: list[Generation] = []
    for number in range(num_changes):
        await asyncio.sleep(start + number * _INTERVAL_S - time.monotonic())
        sent_at = time.monotonic()
        if number % 2 == 0:
            engine = len(generations) % _NUM_ENGINES
            prompt = [1] * (_SHORTEST_PROMPT + len(generations))
            generations.append(client.generate(prompt, engine=engine, ignore_eos=True, temperature=0.0))
        elif len(generations) > _NUM_ENGINES:
            generations[-1 - _NUM_ENGINES].abort()
        else:
            continue
        changes.append(Moment(sent_at, engine, client.engine_loads()[engine].my_tokens))
    await asyncio.sleep(_MARGIN_S)
    for generation in generations:
        generation.abort()
    return changes


async def _watch(client: AsyncScaleClient, until: float) -> list[Moment]:
    sights: list[Moment] = []
    try:
        async with asyncio.timeout(until - time.monotonic()):
            async for loads in client.watch_loads():
                now = time.monotonic()
                sights += [Moment(now, load.engine_id, load.tokens) for load in loads]
    except TimeoutError:
        pass
    return sights


def lags(changes: Sequence[Moment], sights: Sequence[Moment]) -> list[float]:
    """Seconds from each change until it, or a later one of the same engine, was seen; infinite for never.

    Both in order of time. No two changes of an engine give it the same number of tokens.
    """
    found = [math.inf] * len(changes)
    positions = {(change.engine, change.tokens): position for position, change in enumerate(changes)}
    unseen: dict[int, list[int]] = {}
    for position, change in enumerate(changes):
        unseen.setdefault(change.engine, []).append(position)
    for sight in sights:
        newest = positions.get((sight.engine, sight.tokens), -1)
        waiting = unseen.get(sight.engine, [])
        while waiting and waiting[0] <= newest:
            position = waiting.pop(0)
            found[position] = sight.time_s - changes[position].time_s
    return found


def _row(what: str, seconds: Sequence[float], target_ms: float | None = None) -> Row:
    statistics = Statistics.of(seconds)
    p99 = math.nan if statistics.p99 is None else statistics.p99
    return Row(
        SECTION,
        f"{what}: p50, p99",
        {"lag_p50_ms": statistics.median, "lag_p99_ms": statistics.p99},
        "{lag_p50_ms:.2f} ms, {lag_p99_ms:.2f} ms",
        f"{target_ms:g} ms" if target_ms is not None else "",
        p99 < target_ms if target_ms is not None else None,
    )
