"""A mixture of experts on one engine, on engines with all experts each, and on engines in tandem: side by side."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from asyncscale import AsyncScaleClient
from asyncscale.bench.measure import engine_pids, total_cpu_seconds
from asyncscale.bench.random_experts import ExpertSizes, write_checkpoint
from asyncscale.bench.replay import replay
from asyncscale.bench.table import Row
from asyncscale.bench.workload import WorkloadRequest

_KV_BLOCKS = 4096
_ALONE = "1 engine"
_TANDEM = "2 engines in tandem"
_OPTIONS: dict[str, dict[str, Any]] = {
    _ALONE: {"num_engines": 1, "threads_per_engine": 1},
    "1 engine of 2 threads": {"num_engines": 1, "threads_per_engine": 2},
    "2 engines, all experts each": {"num_engines": 2, "threads_per_engine": 1},
    _TANDEM: {"num_engines": 2, "threads_per_engine": 1, "enable_expert_parallel": True},
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. loads: requests at once. num_tokens: of each prompt, and of each output.

    num_rounds: each goes over everything once, so that what else the machine does hits all alike.
    """

    sizes: ExpertSizes = field(default_factory=ExpertSizes)
    loads: tuple[int, ...] = (1, 4, 64)
    num_tokens: int = 48
    num_rounds: int = 7
    num_wakes: int = 40
    idle_s: float = 5.0


QUICK = Plan(
    ExpertSizes(hidden=128, num_layers=2, num_experts=4, inner=128, vocabulary=512),
    loads=(1, 8), num_tokens=16, num_rounds=1, num_wakes=5, idle_s=0.2,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Setting:
    """engine: which gets all requests; None: they are spread."""

    name: str
    client: AsyncScaleClient
    engine: int | None = None

    @property
    def in_tandem(self) -> bool:
        return self.name.startswith(_TANDEM)


async def measure(plan: Plan) -> list[Row]:
    """All clients are there all the time: engines that have nothing to do take nothing from the others."""
    with tempfile.TemporaryDirectory(prefix="asyncscale-bench-") as folder, _private_cache(folder):
        model = Path(folder) / "experts"
        await asyncio.to_thread(write_checkpoint, model, plan.sizes)
        async with _clients(str(model)) as clients:
            settings = [_Setting(name, client) for name, client in clients.items()]
            settings.append(_Setting(f"{_TANDEM}, all requests at one", clients[_TANDEM], engine=0))
            rows = []
            for load in plan.loads:
                rows += await _throughput(settings, load, plan)
            rows += await _first_tokens(settings[:-1], plan)
            return [*rows, await _idle(clients[_TANDEM], plan)]


@contextlib.contextmanager
def _private_cache(folder: str) -> Iterator[None]:
    """Packed weights of a model that is thrown away go with it."""
    before = os.environ.get("ASYNCSCALE_CACHE")
    os.environ["ASYNCSCALE_CACHE"] = f"{folder}/cache"
    try:
        yield
    finally:
        del os.environ["ASYNCSCALE_CACHE"]
        if before is not None:
            os.environ["ASYNCSCALE_CACHE"] = before


@contextlib.asynccontextmanager
async def _clients(model: str) -> AsyncIterator[dict[str, AsyncScaleClient]]:
    common: dict[str, Any] = {
        "num_kv_blocks": _KV_BLOCKS,
        "enable_prefix_caching": False,
        "speculation": "off",
        "progress": False,
    }
    async with contextlib.AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(AsyncScaleClient(model, **common, **options))
            for name, options in _OPTIONS.items()
        }


async def _throughput(settings: Sequence[_Setting], load: int, plan: Plan) -> list[Row]:
    requests = _requests(load, plan)
    for setting in settings:
        await _lap(setting, requests)  # not counted: pages are touched for the first time
    rounds = [[await _lap(setting, requests) for setting in settings] for _ in range(plan.num_rounds)]
    rows = []
    for index, setting in enumerate(settings):
        figures: dict[str, float | None] = {
            "tokens_per_s": statistics.median(laps[index].tokens_per_s for laps in rounds),
            "ratio": statistics.median(laps[index].tokens_per_s / laps[0].tokens_per_s for laps in rounds),
        }
        shown = "{tokens_per_s:,.0f} tok/s, x {ratio:.2f}"
        if setting.in_tandem:
            figures["dummies"] = statistics.median(laps[index].dummies for laps in rounds)
            shown += ", {dummies:.0%} of the steps are dummies"
        rows.append(Row(f"{load} at once", setting.name, figures, shown))
    return rows


def _requests(load: int, plan: Plan) -> list[WorkloadRequest]:
    rng = random.Random(load)
    sampling = {"max_tokens": plan.num_tokens, "ignore_eos": True, "temperature": 0.0}
    prompts = [[rng.randrange(1, plan.sizes.vocabulary) for _ in range(plan.num_tokens)] for _ in range(load)]
    return [WorkloadRequest(0.0, prompt, plan.num_tokens, sampling) for prompt in prompts]


@dataclass(frozen=True, slots=True)
class _Lap:
    """Output tokens per second; dummies: of the steps of all engines, the share of those without tokens."""

    tokens_per_s: float
    dummies: float


async def _lap(setting: _Setting, requests: Sequence[WorkloadRequest]) -> _Lap:
    """Raises ValueError when a request fails."""
    if setting.engine is not None:
        requests = [replace(r, sampling=r.sampling | {"engine": setting.engine}) for r in requests]
    computed, dummies = _computed_steps(setting), await _dummy_steps(setting)
    run = await replay(setting.client, requests, progress=False)
    computed, dummies = _computed_steps(setting) - computed, await _dummy_steps(setting) - dummies
    for record in run.records:
        if record.error is not None:
            raise ValueError(f"a request failed with {setting.name}: {record.error}")
    num_tokens = sum(len(record.token_times_s) for record in run.records)
    return _Lap(num_tokens / run.duration_s, dummies / (computed + dummies))


def _computed_steps(setting: _Setting) -> int:
    """With tokens, of all engines."""
    return setting.client.metrics().all_engines.iteration_tokens_total.count


async def _dummy_steps(setting: _Setting) -> int:
    if not setting.in_tandem:
        return 0
    return sum(stats["num_dummy_steps"] for stats in await setting.client.collective_rpc("tandem_stats"))


async def _first_tokens(settings: Sequence[_Setting], plan: Plan) -> list[Row]:
    """Of requests that find all engines at rest."""
    times: list[list[float]] = [[] for _ in settings]
    for _ in range(plan.num_wakes):
        for setting, mine in zip(settings, times, strict=True):
            start = time.monotonic()
            async for _ in setting.client.generate([1, 2, 3, 4], max_tokens=1, ignore_eos=True):
                mine.append(time.monotonic() - start)
    return [
        Row("alone, after a pause", setting.name, {"ttft_ms": 1000 * statistics.median(mine)}, "TTFT {ttft_ms:.1f} ms")
        for setting, mine in zip(settings, times, strict=True)
    ]


async def _idle(client: AsyncScaleClient, plan: Plan) -> Row:
    engines = await engine_pids(client)
    before = total_cpu_seconds(engines)
    await asyncio.sleep(plan.idle_s)
    used = 1000 * (total_cpu_seconds(engines) - before) / plan.idle_s
    return Row("idle", f"CPU of {_TANDEM}", {"ms_per_s": used}, "{ms_per_s:.2f} ms per second")
