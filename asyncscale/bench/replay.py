"""Plays a workload against a client and notes when each token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from asyncscale import AsyncScaleClient, AsyncScaleError, Generation
from asyncscale.bench.workload import WorkloadRequest


@dataclass(slots=True)
class RequestRecord:
    """What became of one request. Times in seconds from the start of the run; `error` is None when it succeeded.

    generation: the request itself, unless it was refused.
    """

    arrival_s: float
    num_prompt_tokens: int
    token_times_s: list[float] = field(default_factory=list)
    error: str | None = None
    generation: Generation | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """records: in the order of the requests. duration_s: until the last of them ended."""

    records: list[RequestRecord]
    duration_s: float


async def replay(
    client: AsyncScaleClient,
    requests: Sequence[WorkloadRequest],
    *,
    read_text: bool = False,
    start: float | None = None,
    progress: bool = True,
) -> Run:
    """Send each request at its time, however many are under way, and read all answers token by token.

    read_text: look at each token's text as well, so that it must be made. start: the time.monotonic() of the run's
    start, which several processes may share; None is now. progress: show a bar on stderr while it runs, when that is a
    terminal. Requests that fail are recorded; other errors than AsyncScaleError are raised.
    """
    began = time.monotonic() if start is None else start

    async def play(request: WorkloadRequest) -> RequestRecord:
        record = RequestRecord(request.arrival_s, request.num_prompt_tokens)
        await asyncio.sleep(max(0.0, began + request.arrival_s - time.monotonic()))
        try:
            record.generation = client.generate(request.prompt, **request.sampling)
            async for token in record.generation:
                record.token_times_s.append(time.monotonic() - began)
                if read_text:
                    _ = token.text
        except AsyncScaleError as error:
            record.error = f"{type(error).__name__}: {error}"
        bar.update()
        return record

    disable = None if progress else True  # None: unless it is a terminal
    with tqdm(total=len(requests), unit="req", disable=disable, leave=False) as bar:
        async with asyncio.TaskGroup() as group:
            players = [group.create_task(play(request)) for request in requests]
    return Run([player.result() for player in players], time.monotonic() - began)
