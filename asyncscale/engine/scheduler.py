"""Continuous batching: which sequences compute how many tokens in the next step, and in which KV-cache blocks.

A request waits, then holds a row of the SequenceTable: first prefilling (in chunks, where the token budget asks for
it), then decoding, one token per step, or several where guesses of them come true. All decoding rows are handled
together with numpy; Python runs per row only for the few that need or complete a block, prefill, guess, enter or leave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from asyncscale.config import EngineConfig
from asyncscale.engine.batch import Batch, Int32, SequenceTable, StepResult
from asyncscale.engine.block_pool import BlockPool, block_digest
from asyncscale.engine.drafting import Drafter
from asyncscale.engine.request import Request
from asyncscale.engine.waiting_queue import WaitingQueue

_NOTHING_TO_CACHE = np.iinfo(np.int32).max  # as if all blocks of the row were cached already
_NO_PRIORITY = np.iinfo(np.int64).min  # of a row without request: never the worst


class RowListener(Protocol):
    """Is told which request occupies which row. The runner is one."""

    def add(self, row: int, request: Request) -> None: ...

    def remove(self, row: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """The next step's batch (None: nothing to compute), the requests that can never fit, with the reason, and those
    that lost their places to others."""

    batch: Batch | None
    failed: list[tuple[Request, str]] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    """Order of service: running requests first, then waiting ones by priority (lower first), their client's share of
    what runs, and arrival: see WaitingQueue.

    A request is admitted when there is a row for it, budget for its first token, and blocks for all its known tokens,
    which it takes at once: a prefill never runs out of blocks half-way. Decoding rows take a block as they need it.
    When there is none, a running request is preempted: of the worst priority, and there of the client that has the
    most, the last to arrive. It gives up its blocks and is computed anew later. To admit a request, only requests of a
    strictly worse priority are preempted, so that no two displace each other in turn.

    Drafts take what budget and blocks everybody else leaves: no request waits or is preempted for them, and blocks that
    hold nothing after the step but what was wrong are given back.

    The caller runs `schedule`, executes the batch, and hands the result to `advance`.
    """

    def __init__(self, config: EngineConfig, *, num_blocks: int, max_model_len: int) -> None:
        self.table = SequenceTable(config.max_num_seqs, max_model_len, config.block_size)
        self.pool = BlockPool(num_blocks)
        self.prefix_queries = 0  # tokens looked up, and of them found, in the prefix cache at first admission
        self.prefix_hits = 0
        self.listeners: Sequence[RowListener] = ()
        self.drafter: Drafter | None = None
        self._config = config
        self._waiting = WaitingQueue()
        self._prefilling: list[Request] = []
        self._preempted: list[Request] = []  # since the last step
        self._requests: list[Request | None] = [None] * config.max_num_seqs
        self._empty_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._decoding = np.zeros(config.max_num_seqs, np.bool_)
        self._rows: Int32 | None = None  # those that decode, until they change
        self._priority = np.full(config.max_num_seqs, _NO_PRIORITY, np.int64)
        self._num_cached_blocks: Int32 = np.zeros(config.max_num_seqs, np.int32)
        self._ones: Int32 = np.ones(config.max_num_seqs, np.int32)

    @property
    def num_running(self) -> int:
        return len(self._requests) - len(self._empty_rows)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def running(self) -> Iterator[Request]:
        return (request for request in self._requests if request is not None)

    def request_at(self, row: int) -> Request:
        request = self._requests[row]
        if request is None:
            raise RuntimeError(f"row {row} is empty")
        return request

    def add(self, request: Request) -> None:
        """Queue a request. The caller has checked that its known tokens fit into the table and the pool."""
        self._waiting.push(request)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is."""
        if request.row < 0:
            self._waiting.discard(request)
        else:
            self._vacate(request)

    def schedule(self, now: float) -> Schedule:
        """Choose the next step's work. `now`: the time that newly admitted requests are stamped with."""
        failed = self._allocate_decode_blocks()
        self._admit(now)
        batch = self._make_batch()
        if batch is not None and self.drafter is not None:
            batch = self._add_drafts(batch, self.drafter)
        preempted, self._preempted = self._preempted, []
        return Schedule(batch, failed, preempted)

    def advance(self, batch: Batch, result: StepResult) -> list[Request]:
        """Record what was computed and sampled. Returns the requests whose prefill is now complete."""
        table = self.table
        computed, positions = batch.num_new_tokens, table.num_tokens[result.rows]
        if batch.num_drafts is not None:
            computed, positions = self._settle_drafts(batch, batch.num_drafts, result)
        table.num_computed_tokens[batch.rows] += computed
        complete = self._advance_prefills() if self._prefilling else []
        table.token_ids[result.rows, positions] = result.token_ids
        table.num_tokens[result.rows] = positions + 1
        return complete

    def weights_changed(self, *, recompute: bool) -> None:
        """No keys and values that were computed until now are found any more in the prefix cache.

        recompute: requests that run are queued to be computed anew; else they go on with what they have, and the cache
        gets nothing of them.
        """
        for request in list(self.running()):
            if recompute:
                self._requeue(request)
            else:
                self._num_cached_blocks[request.row] = _NOTHING_TO_CACHE
        self.pool.reset_cache()

    def check_integrity(self) -> None:
        """Audit rows and blocks; raises RuntimeError. For tests."""
        rows = {request.row for request in self.running()}
        if rows & set(self._empty_rows) or len(rows) + len(self._empty_rows) != len(self._requests):
            raise RuntimeError("a row is both empty and occupied, or neither, or twice")
        for row in rows:
            if self.table.num_blocks[row] > self._blocks_for(int(self.table.num_tokens[row])):
                raise RuntimeError(f"row {row} has more blocks than tokens to fill them")
        self.pool.check_integrity([self._blocks(row) for row in rows])

    # --- before the step: blocks, admission, batch

    def _allocate_decode_blocks(self) -> list[tuple[Request, str]]:
        """A block for each decoding row whose next token starts one. Returns requests that outgrew the whole pool."""
        table, pool = self.table, self.pool
        failed = []
        while (rows := self._rows_without_block()).size > pool.num_free:
            outgrown = rows[table.num_blocks[rows] >= pool.num_blocks]
            for row in outgrown.tolist():
                request = self.request_at(row)
                self._vacate(request)
                failed.append((request, self.no_room_message(int(table.num_tokens[row]))))
            if not outgrown.size:
                self._preempt(self._worst_running())
        if rows.size:
            table.block_table[rows, table.num_blocks[rows]] = pool.allocate(rows.size)
            table.num_blocks[rows] += 1
        return failed

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether so many tokens fit into the KV cache when nothing else is in it."""
        return self._blocks_for(num_tokens) <= self.pool.num_blocks

    def no_room_message(self, num_tokens: int) -> str:
        needed = self._blocks_for(num_tokens)
        return f"{num_tokens} tokens need {needed} KV-cache blocks, and this engine has {self.pool.num_blocks} in all"

    def _decoding_rows(self) -> Int32:
        if self._rows is None:
            self._rows = self._decoding.nonzero()[0].astype(np.int32)
        return self._rows

    def _rows_without_block(self) -> Int32:
        table, rows = self.table, self._decoding_rows()
        full: Int32 = rows[table.num_computed_tokens[rows] == table.num_blocks[rows] * table.block_size]
        return full

    def _admit(self, now: float) -> None:
        """Give rows and blocks to waiting requests, best first, while the budget that running ones leave lasts."""
        if not self._waiting:
            return
        budget = self._config.max_num_batched_tokens - self._decoding_rows().size
        budget -= int(self._num_remaining([request.row for request in self._prefilling]).sum())
        # Where no row is empty, a preemption would free the tokens of the row that it empties.
        while self._waiting and budget >= (1 if self._empty_rows else 0):
            request = self._waiting.first
            cached = self._cached_prefix(request) if self._empty_rows else []
            if self._empty_rows and self._has_blocks(request, cached):
                self._occupy(self._waiting.pop(), cached, now)
                budget -= int(self._num_remaining(request.row))
            elif self._priority.max() > request.priority:
                victim = self._worst_running()
                budget += int(self._num_remaining(victim.row))
                self._preempt(victim)
            else:
                return

    def _cached_prefix(self, request: Request) -> list[int]:
        """Cached blocks of the request's beginning; never all of it: its last token's logits must be computed."""
        if not self._config.enable_prefix_caching or request.sampling.prompt_logprobs is not None:
            return []
        num_blocks = (len(request.token_ids) - 1) // self.table.block_size
        self._extend_digests(request, request.token_ids, num_blocks)
        return self.pool.lookup(request.block_digests[:num_blocks])

    def _has_blocks(self, request: Request, cached: list[int]) -> bool:
        return self.pool.can_allocate(self._blocks_for(len(request.token_ids)) - len(cached), touching=cached)

    def _make_batch(self) -> Batch | None:
        """Decoding rows first, then as much of the prefilling ones, best first, as the budget allows."""
        decoding = self._decoding_rows()
        if not self._prefilling:
            return Batch(self.table, decoding, self._ones[: decoding.size], decoding.size) if decoding.size else None
        self._prefilling.sort(key=lambda request: request.rank)
        rows = np.array([request.row for request in self._prefilling], np.int32)
        end = np.minimum(self._num_remaining(rows).cumsum(), self._config.max_num_batched_tokens - decoding.size)
        chunks = end.astype(np.int32)
        chunks[1:] -= chunks[:-1].copy()
        return Batch(
            self.table,
            np.concatenate((decoding, rows[chunks > 0])),
            np.concatenate((self._ones[: decoding.size], chunks[chunks > 0])),
            decoding.size,
        )

    def _add_drafts(self, batch: Batch, drafter: Drafter) -> Batch:
        """The batch with guesses for its decoding rows, as far as there is room for them."""
        table = self.table
        rows = batch.rows[: batch.num_decodes]
        budget = self._config.max_num_batched_tokens - rows.size
        if batch.rows.size > rows.size:
            budget -= int(batch.num_new_tokens[rows.size :].sum())
        drafts = drafter.draft(rows, budget)
        if not drafts:
            return batch
        num_drafts = np.zeros(batch.rows.size, np.int32)
        for index, token_ids in drafts:
            row = int(rows[index])
            start = int(table.num_tokens[row])
            end = self._make_room(row, start + len(token_ids))
            table.token_ids[row, start:end] = token_ids[: end - start]
            num_drafts[index] = end - start
        if not num_drafts.any():
            return batch
        return replace(batch, num_new_tokens=batch.num_new_tokens + num_drafts, num_drafts=num_drafts)

    def _make_room(self, row: int, num_tokens: int) -> int:
        """Take blocks for the first `num_tokens` of a row, or as many as are free. For how many tokens it has them."""
        table = self.table
        num_blocks = int(table.num_blocks[row])
        missing = min(self._blocks_for(num_tokens) - num_blocks, self.pool.num_free)
        if missing > 0:
            table.block_table[row, num_blocks : num_blocks + missing] = self.pool.allocate(missing)
            table.num_blocks[row] = num_blocks = num_blocks + missing
        return min(num_tokens, num_blocks * table.block_size)

    # --- after the step

    def _settle_drafts(self, batch: Batch, num_drafts: Int32, result: StepResult) -> tuple[Int32, Int32]:
        """How many of each of the batch's tokens count as computed, and the position of each that was sampled."""
        table, rows = self.table, result.rows
        starts = np.flatnonzero(np.diff(rows, prepend=-1)).astype(np.int32)  # of each row's run
        num_sampled = np.diff(starts, append=np.int32(rows.size))
        nth = np.arange(rows.size, dtype=np.int32) - np.repeat(starts, num_sampled)
        of_row = np.zeros(len(self._requests), np.int32)
        of_row[rows[starts]] = num_sampled
        computed: Int32 = np.where(num_drafts > 0, of_row[batch.rows], batch.num_new_tokens)
        for index in np.flatnonzero(num_drafts).tolist():
            row, num_computed = int(batch.rows[index]), int(computed[index])
            self._drop_blocks(row, int(table.num_computed_tokens[row]) + num_computed)
            if self.drafter is not None:
                self.drafter.record(row, int(num_drafts[index]), num_computed - 1)
        positions: Int32 = table.num_tokens[rows] + nth
        return computed, positions

    def _drop_blocks(self, row: int, num_tokens: int) -> None:
        """Give back the blocks beyond a row's first `num_tokens`."""
        table, kept = self.table, self._blocks_for(num_tokens)
        self.pool.free(reversed(self._blocks(row)[kept:]))
        table.num_blocks[row] = kept

    def _cache_full_blocks(self, request: Request) -> None:
        """Let others find what is computed of this request: its prompt as it is computed, its answer when it ends."""
        if not self._config.enable_prefix_caching:
            return
        row = request.row
        start = int(self._num_cached_blocks[row])
        end = int(self.table.num_computed_tokens[row]) // self.table.block_size
        if start >= end:
            return
        self._extend_digests(request, self.table.token_ids[row], end)
        blocks = self.table.block_table[row, start:end].tolist()
        for block, digest in zip(blocks, request.block_digests[start:end], strict=True):
            self.pool.cache(block, digest)
        self._num_cached_blocks[row] = end

    def _extend_digests(self, request: Request, token_ids: Int32, num_blocks: int) -> None:
        digests, size = request.block_digests, self.table.block_size
        for index in range(len(digests), num_blocks):
            parent = digests[-1] if digests else None
            digests.append(block_digest(parent, token_ids[index * size : (index + 1) * size].tobytes()))

    def _advance_prefills(self) -> list[Request]:
        """Those whose prompt is complete decode from now on."""
        for request in self._prefilling:
            self._cache_full_blocks(request)
        complete = [request for request in self._prefilling if self._num_remaining(request.row) == 0]
        for request in complete:
            self._set_decoding(request.row, True)
        self._prefilling = [request for request in self._prefilling if not self._decoding[request.row]]
        return complete

    # --- rows

    def _num_remaining(self, rows: int | Sequence[int] | Int32) -> Int32:
        """How many known tokens are not computed yet."""
        remaining: Int32 = self.table.num_tokens[rows] - self.table.num_computed_tokens[rows]
        return remaining

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.table.block_size)

    def _blocks(self, row: int) -> list[int]:
        blocks: list[int] = self.table.block_table[row, : self.table.num_blocks[row]].tolist()
        return blocks

    def _worst_running(self) -> Request:
        # By client before arrival, or a flood that came first would take the blocks of those who come later. The oldest
        # of a class is its worst only when it is alone: so some request always goes on to its end.
        rows = np.flatnonzero(self._priority == self._priority.max()).tolist()
        requests = [self.request_at(row) for row in rows]
        num_running = Counter(request.client for request in requests)
        return max(requests, key=lambda request: (num_running[request.client], request.order))

    def _occupy(self, request: Request, cached: list[int], now: float) -> None:
        table, num_tokens = self.table, len(request.token_ids)
        num_cached_tokens = len(cached) * table.block_size
        self.pool.touch(cached)
        blocks = cached + self.pool.allocate(self._blocks_for(num_tokens) - len(cached))
        row = request.row = self._empty_rows.pop()
        table.token_ids[row, :num_tokens] = request.token_ids
        table.num_tokens[row] = num_tokens
        table.num_prompt_tokens[row] = request.num_prompt_tokens
        table.num_computed_tokens[row] = num_cached_tokens
        table.block_table[row, : len(blocks)] = blocks
        table.num_blocks[row] = len(blocks)
        self._num_cached_blocks[row] = len(cached)
        self._requests[row] = request
        self._priority[row] = request.priority
        self._prefilling.append(request)
        if request.scheduled_at is None:
            request.scheduled_at = now
            request.num_cached_tokens = num_cached_tokens
            self.prefix_queries += num_tokens
            self.prefix_hits += num_cached_tokens
        for listener in self.listeners:
            listener.add(row, request)

    def _vacate(self, request: Request) -> None:
        row = request.row
        self._cache_full_blocks(request)
        for listener in self.listeners:
            listener.remove(row)
        self.pool.free(reversed(self._blocks(row)))
        if self._decoding[row]:
            self._set_decoding(row, False)
        else:
            self._prefilling.remove(request)
        self._priority[row] = _NO_PRIORITY
        self._requests[row] = None
        self._waiting.stopped(request)
        self._empty_rows.append(row)
        request.row = -1

    def _set_decoding(self, row: int, decoding: bool) -> None:
        self._decoding[row] = decoding
        self._rows = None

    def _preempt(self, request: Request) -> None:
        request.num_preemptions += 1
        self._preempted.append(request)
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        """Take its row and blocks away; it is computed anew when there is room."""
        request.token_ids = self.table.token_ids[request.row, : self.table.num_tokens[request.row]].copy()
        self._vacate(request)
        self._waiting.push(request)
