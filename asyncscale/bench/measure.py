"""A replay with what client and engines used for it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from asyncscale import AsyncScaleClient
from asyncscale.bench.replay import Run, replay
from asyncscale.bench.report import Report, summarize
from asyncscale.bench.usage import Usage, cpu_seconds, process_usage
from asyncscale.bench.workload import WorkloadRequest


async def measured_replay(
    client: AsyncScaleClient, requests: Sequence[WorkloadRequest], *, read_text: bool = False
) -> tuple[Run, Report]:
    """Play the requests (see `replay`) against a client of this process, and sum up."""
    pids = {"client": os.getpid()} | {f"engine-{i}": pid for i, pid in enumerate(await engine_pids(client))}
    before = _usages(pids)
    run = await replay(client, requests, read_text=read_text)
    return run, summarize(run.records, run.duration_s, before, _usages(pids))


async def engine_pids(client: AsyncScaleClient) -> list[int]:
    """In engine order."""
    return [info["pid"] for info in await client.collective_rpc("process_info")]


def total_cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of all these processes together."""
    return sum(map(cpu_seconds, pids))


def _usages(pids: dict[str, int]) -> dict[str, Usage]:
    return {name: usage for name, pid in pids.items() if (usage := process_usage(pid)) is not None}
