"""What waves cost by themselves: simulated engines that step together, beside ones that do not."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import Any

from asyncscale import AsyncScaleClient, SimulatedModel
from asyncscale.bench.measure import engine_pids, total_cpu_seconds
from asyncscale.bench.table import Row

_NUM_ENGINES = 2
_BASE_MS = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """num_steps: of one request at each engine. num_waves: requests of one token, one after the other."""

    num_steps: int = 1000
    num_waves: int = 300


QUICK = Plan(num_steps=30, num_waves=10)


async def measure(plan: Plan) -> list[Row]:
    """Both kinds are there at once."""
    options: dict[str, Any] = {"num_engines": _NUM_ENGINES, "speculation": "off", "progress": False}
    on_their_own = SimulatedModel(base_ms=_BASE_MS, decode_us=0, prefill_us=0)
    in_tandem = SimulatedModel(base_ms=_BASE_MS, decode_us=0, prefill_us=0, lockstep=True)
    async with AsyncScaleClient(on_their_own, **options) as one, AsyncScaleClient(in_tandem, **options) as other:
        clients = {"on their own": one, "in tandem": other}
        for client in clients.values():
            await _stream(client, 2)
        rows = [await _steps(name, client, plan) for name, client in clients.items()]
        return rows + [await _waves(name, client, plan) for name, client in clients.items()]


async def _steps(name: str, client: AsyncScaleClient, plan: Plan) -> Row:
    engines = await engine_pids(client)
    own, used, start = time.process_time(), total_cpu_seconds(engines), time.monotonic()
    await _stream(client, plan.num_steps)
    step_ms = 1000 * (time.monotonic() - start) / plan.num_steps
    used, own = total_cpu_seconds(engines) - used, time.process_time() - own
    figures = {
        "step_ms": step_ms,
        "engine_us": 1e6 * used / plan.num_steps / _NUM_ENGINES,
        "client_us": 1e6 * own / plan.num_steps,
    }
    shown = "{step_ms:.2f} ms; CPU {engine_us:.0f} us per engine, {client_us:.0f} us of the client"
    return Row(f"a step of {_BASE_MS:g} ms", f"{_NUM_ENGINES} engines {name}", figures, shown)


async def _stream(client: AsyncScaleClient, num_tokens: int) -> None:
    await asyncio.gather(
        *(client.generate("x", max_tokens=num_tokens, ignore_eos=True, engine=i) for i in range(_NUM_ENGINES))
    )


async def _waves(name: str, client: AsyncScaleClient, plan: Plan) -> Row:
    engines = await engine_pids(client)
    own, used = time.process_time(), total_cpu_seconds(engines)
    times = []
    for index in range(plan.num_waves):
        start = time.monotonic()
        await client.generate("x", max_tokens=1, ignore_eos=True, engine=index % _NUM_ENGINES)
        times.append(time.monotonic() - start)
    used, own = total_cpu_seconds(engines) - used, time.process_time() - own
    figures = {
        "ms": 1000 * statistics.median(times),
        "engines_us": 1e6 * used / plan.num_waves,
        "client_us": 1e6 * own / plan.num_waves,
    }
    shown = "{ms:.2f} ms; CPU {engines_us:.0f} us of all engines, {client_us:.0f} us of the client"
    return Row("a request of one step", f"{_NUM_ENGINES} engines {name}", figures, shown)
