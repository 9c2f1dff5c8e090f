"""Attention in the native kernel: what each of its threads takes at a time, planned with numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncscale.engine.batch import Batch
from asyncscale.kernels.attention import AttentionKernel, PlannedAttention
from asyncscale.model.torch_kv_cache import KVCache

# Rows (tokens times the query heads that share a key head) computed together: they share the reading of keys and
# values, and their sums stay in the second-level cache.
_ROWS = 96
# Multiplications for which starting a thread pays: about 100 microseconds' work.
_WORK_PER_THREAD = 4_000_000


class NativeAttention:
    """An Attention of attention.py."""

    def __init__(self, kernel: AttentionKernel, cache: KVCache, num_heads: int) -> None:
        self._kernel = kernel
        self._cache = cache
        self._num_heads = num_heads
        self._tokens_together = max(_ROWS * cache.num_kv_heads // num_heads, 1)
        self._scale = cache.data.shape[-1] ** -0.5

    def plan(self, batch: Batch, window: int | None) -> NativePlan:
        """window: how many positions a token sees, its own included; None for all before it."""
        items = _items(batch, self._tokens_together)
        planned = self._kernel.plan(
            items,
            batch.table.block_table,
            scale=self._scale,
            window=window,
            num_threads=min(torch.get_num_threads(), 1 + self._work(items, window) // _WORK_PER_THREAD),
        )
        return NativePlan(planned, self._cache)

    def _work(self, items: npt.NDArray[np.int64], window: int | None) -> int:
        _, num_tokens, positions, _ = items.T
        keys = positions + num_tokens if window is None else np.minimum(positions, window) + num_tokens
        return int((num_tokens * keys).sum()) * self._num_heads * self._cache.data.shape[-1] * 2


@dataclass(frozen=True, slots=True)
class NativePlan:
    """What every layer with the same window does in a step."""

    planned: PlannedAttention
    cache: KVCache

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """queries: [tokens, num_heads, head_dim]. Returns the same shape and dtype."""
        output = torch.empty_like(queries, memory_format=torch.contiguous_format)
        self.planned.run(queries, self.cache.data[layer], output)
        return output


def _items(batch: Batch, tokens_together: int) -> npt.NDArray[np.int64]:
    """The kernel's items: each sequence's new tokens, at most so many together."""
    counts = batch.num_new_tokens.astype(np.int64)
    num_items = -(-counts // tokens_together)
    sequences = np.repeat(np.arange(len(counts)), num_items)
    done = (np.arange(len(sequences)) - np.repeat(np.cumsum(num_items) - num_items, num_items)) * tokens_together
    first_tokens = np.cumsum(counts) - counts
    rows = batch.rows[sequences]
    return np.column_stack(
        (
            first_tokens[sequences] + done,
            np.minimum(counts[sequences] - done, tokens_together),
            batch.table.num_computed_tokens[rows] + done,
            rows,
        )
    )
