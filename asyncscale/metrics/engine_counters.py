"""What an engine counts, in a small file beside its socket: it can be read while the engine hangs, and after its end.

The engine maps the file and writes to memory; whoever wants to know reads the file: numbers as in `ENGINE_LAYOUT`,
64-bit integers. Who reads while a step is counted may see some of it and not yet the rest.
"""

from __future__ import annotations

import mmap
import os
from array import array
from typing import TYPE_CHECKING, cast

from asyncscale.metrics.catalog import ENGINE_LAYOUT as LAYOUT
from asyncscale.metrics.layout import FRACTION

if TYPE_CHECKING:
    from collections.abc import MutableSequence

    from asyncscale.engine.block_pool import BlockPool
    from asyncscale.engine.drafting import Drafter
    from asyncscale.engine.request import Request
    from asyncscale.engine.scheduler import Scheduler

_CELL_BYTES = 8
_RUNNING, _WAITING, _USAGE = map(LAYOUT.at, ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))
_PROMPT, _GENERATION = map(LAYOUT.at, ("prompt_tokens", "generation_tokens"))
_PREEMPTIONS = LAYOUT.at("num_preemptions")
_QUERIES, _HITS = map(LAYOUT.at, ("prefix_cache_queries", "prefix_cache_hits"))
_DRAFTED, _ACCEPTED = map(LAYOUT.at, ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"))
_MALFORMED = LAYOUT.at("engine_malformed_messages")


class EngineCounters:
    """The engine's side::

        counters = EngineCounters(path)         # the file is made by who starts the engine, with `make_file`
        counters.load(running, waiting, pool)   # whenever that changes
        counters.step(num_tokens=128, num_generated=64)
        counters.scheduled(scheduler, drafter)
        counters.prompt_computed(request)

    Each call costs some stores to memory. Without a path, nobody sees it.
    """

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            memory = mmap.mmap(-1, LAYOUT.size * _CELL_BYTES)
        else:
            with open(path, "r+b") as file:
                memory = mmap.mmap(file.fileno(), LAYOUT.size * _CELL_BYTES)
        self._cells = cells = cast("MutableSequence[int]", memoryview(memory).cast("q"))
        self._iteration_tokens = LAYOUT.observer(cells, "iteration_tokens_total")

    def load(self, running: int, waiting: int, pool: BlockPool) -> None:
        """How it is now."""
        cells = self._cells
        cells[_RUNNING] = running
        cells[_WAITING] = waiting
        cells[_USAGE] = FRACTION * (pool.num_blocks - pool.num_free) // pool.num_blocks

    def scheduled(self, scheduler: Scheduler, drafter: Drafter) -> None:
        """What these have counted since the engine's start, and the KV cache of now."""
        cells, pool = self._cells, scheduler.pool
        cells[_USAGE] = FRACTION * (pool.num_blocks - pool.num_free) // pool.num_blocks
        cells[_QUERIES] = scheduler.prefix_queries
        cells[_HITS] = scheduler.prefix_hits
        cells[_DRAFTED] = drafter.num_drafted
        cells[_ACCEPTED] = drafter.num_accepted

    def step(self, num_tokens: int, num_generated: int) -> None:
        """A step has computed so many tokens, and made so many new ones."""
        self._cells[_GENERATION] += num_generated
        self._iteration_tokens(num_tokens)

    def preempted(self, count: int) -> None:
        """So many sequences gave up their blocks."""
        self._cells[_PREEMPTIONS] += count

    def prompt_computed(self, request: Request) -> None:
        """Of a sequence, for the first time."""
        self._cells[_PROMPT] += request.num_prompt_tokens

    def malformed(self) -> None:
        """A message made no sense."""
        self._cells[_MALFORMED] += 1


def make_file(path: str) -> None:
    """For an engine that is started next: all zero."""
    with open(path, "xb") as file:
        file.truncate(LAYOUT.size * _CELL_BYTES)


def read_file(path: str) -> list[int] | None:
    """What the engine has counted until now; None when there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        content = os.read(descriptor, (LAYOUT.size + 1) * _CELL_BYTES)
    finally:
        os.close(descriptor)
    return array("q", content).tolist() if len(content) == LAYOUT.size * _CELL_BYTES else None
