"""When a request ends by itself: at a stop token, at its max_tokens, or at the end of the context."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from asyncscale.engine.batch import Int32, SequenceTable
from asyncscale.engine.request import Request
from asyncscale.messages import FinishReason


class Stop(NamedTuple):
    """A row that ends, and why. stop_token_id: the token that ended it, where one did."""

    row: int
    reason: FinishReason
    stop_token_id: int | None = None


class StopConditions:
    """Finds the rows that end with their newest token.

    Two array look-ups rule out nearly every row: has it reached its limit, and does *any* running request stop at the
    token that it got? Only the rows that are left are decided one by one.
    """

    def __init__(self, table: SequenceTable, vocab_size: int) -> None:
        max_num_seqs, self._max_model_len = table.token_ids.shape
        self._table = table
        self._requests: list[Request | None] = [None] * max_num_seqs
        self._limit: Int32 = np.zeros(max_num_seqs, np.int32)  # num_tokens at which a row is full
        self._num_stop_tokens = 0  # of all rows together
        self._num_stopping: Int32 = np.zeros(vocab_size, np.int32)  # token id -> how many rows stop at it

    def add(self, row: int, request: Request) -> None:
        self._requests[row] = request
        self._limit[row] = min(request.num_prompt_tokens + request.sampling.max_tokens, self._max_model_len)
        self._num_stop_tokens += len(request.sampling.stop_token_ids)
        for token_id in request.sampling.stop_token_ids:
            self._num_stopping[token_id] += 1

    def remove(self, row: int) -> None:
        request, self._requests[row] = self._requests[row], None
        stop_token_ids = request.sampling.stop_token_ids if request else ()
        self._num_stop_tokens -= len(stop_token_ids)
        for token_id in stop_token_ids:
            self._num_stopping[token_id] -= 1

    def find(self, rows: Int32, token_ids: Int32) -> list[Stop]:
        """Of `rows`, whose newest tokens (already in the table) are `token_ids`, those that end."""
        full = self._table.num_tokens[rows] >= self._limit[rows]
        suspected = full | (self._num_stopping[token_ids] > 0) if self._num_stop_tokens else full
        suspects = suspected.nonzero()[0]
        if not suspects.size:
            return []
        stops = (
            self._decide(row, token_id, is_full)
            for row, token_id, is_full in zip(
                rows[suspects].tolist(), token_ids[suspects].tolist(), full[suspects].tolist(), strict=True
            )
        )
        return [stop for stop in stops if stop is not None]

    def _decide(self, row: int, token_id: int, is_full: bool) -> Stop | None:
        request = self._requests[row]
        if request is None:
            raise RuntimeError(f"row {row} is empty")
        num_generated_before = int(self._table.num_tokens[row]) - request.num_prompt_tokens - 1
        if token_id in request.sampling.stop_token_ids and num_generated_before >= request.sampling.min_tokens:
            return Stop(row, "stop", token_id)
        return Stop(row, "length") if is_full else None
