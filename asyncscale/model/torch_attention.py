"""Attention in torch, for devices and machines without the native kernel.

Sequences that decode one token are padded to a common length in groups; a chunk of a prompt is computed alone, in
blocks of queries. Scores, softmax and sums are float32 whatever the cache's dtype: scores rounded to bfloat16 change
the model's top token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncscale.engine.batch import Batch
from asyncscale.model.torch_kv_cache import KVCache

Int64 = npt.NDArray[np.int64]

# Padded tokens gathered at once for decodes: enough to amortize the calls, few enough to stay in the caches.
_GROUP_TOKENS = 4096
# Queries of a chunk computed at once: keys after the last of them are skipped, and the scores stay in the caches.
_QUERY_TOKENS = 128


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one new token each. tokens: int64[m], where in the step. mask: [m, 1, keys], 0 or -inf."""

    tokens: Tensor
    rows: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class QueryBlock:
    """Queries start .. stop of the step see keys 0 .. num_keys of the chunk's; mask covers the last of these."""

    start: int
    stop: int
    num_keys: int
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several new tokens of one sequence."""

    rows: Tensor
    blocks: tuple[QueryBlock, ...]


class TorchAttention:
    """An Attention of attention.py."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def plan(self, batch: Batch, window: int | None) -> TorchPlan:
        """window: how many positions a token sees, its own included; None for all before it."""
        cache = self._cache
        first_tokens = np.cumsum(batch.num_new_tokens) - batch.num_new_tokens
        is_decode = batch.num_new_tokens == 1
        decodes = np.flatnonzero(is_decode)
        return TorchPlan(
            cache,
            tuple(_decode_groups(batch, decodes, first_tokens, cache, window)),
            tuple(_chunk(batch, int(i), int(first_tokens[i]), cache, window) for i in np.flatnonzero(~is_decode)),
        )


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """What every layer with the same window does in a step."""

    cache: KVCache
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """queries: [tokens, num_heads, head_dim]. Returns the same shape and dtype."""
        output = torch.empty_like(queries, memory_format=torch.contiguous_format)
        scaled = queries.float() * queries.shape[-1] ** -0.5
        for group in self.decodes:
            output[group.tokens] = _decode(group, self.cache, layer, scaled[group.tokens]).to(output.dtype)
        for chunk in self.chunks:
            keys, values = (part.float() for part in self.cache.gather(layer, chunk.rows, 1))
            for block in chunk.blocks:
                output[block.start : block.stop] = _prefill(block, keys, values, scaled[block.start : block.stop])
        return output


def _decode(group: DecodeGroup, cache: KVCache, layer: int, queries: Tensor) -> Tensor:
    num_sequences, num_heads, head_dim = queries.shape
    keys, values = (part.float() for part in cache.gather(layer, group.rows, num_sequences))
    grouped = queries.view(len(keys), -1, head_dim)  # the query heads that share a key head
    scores = torch.bmm(grouped, keys.transpose(1, 2))
    scores.view(num_sequences, num_heads, -1).add_(group.mask)
    return torch.bmm(scores.softmax(-1), values).view(queries.shape)


def _prefill(block: QueryBlock, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
    num_queries, num_heads, head_dim = queries.shape
    num_kv_heads = len(keys)
    grouped = queries.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    scores = torch.bmm(grouped, keys[:, : block.num_keys].transpose(1, 2))
    by_head = scores.view(num_heads, num_queries, -1)
    by_head[..., block.num_keys - block.mask.shape[1] :].add_(block.mask)
    attended = torch.bmm(scores.softmax(-1), values[:, : block.num_keys])
    return attended.view(num_heads, num_queries, head_dim).transpose(0, 1)


def _decode_groups(
    batch: Batch, decodes: Int64, first_tokens: Int64, cache: KVCache, window: int | None
) -> Iterator[DecodeGroup]:
    table, size = batch.table, cache.block_size
    lengths = table.num_computed_tokens[batch.rows[decodes]].astype(np.int64) + 1
    starts = np.maximum(lengths - window, 0) if window is not None else np.zeros_like(lengths)
    first_blocks = starts // size
    num_blocks = -(-lengths // size) - first_blocks
    order = np.argsort(-num_blocks, kind="stable")  # so that a group's sequences are about equally long
    done = 0
    while done < len(order):
        longest = int(num_blocks[order[done]])
        members = order[done : done + max(1, _GROUP_TOKENS // (longest * size))]
        done += len(members)
        columns = first_blocks[members, None] + np.arange(longest)
        last = first_blocks[members] + num_blocks[members] - 1
        rows = batch.rows[decodes[members]]
        blocks = table.block_table[rows[:, None], np.minimum(columns, last[:, None])]
        positions = first_blocks[members, None] * size + np.arange(longest * size)
        visible = (positions >= starts[members, None]) & (positions < lengths[members, None])
        yield DecodeGroup(
            _to_device(first_tokens[decodes[members]], cache),
            cache.gather_rows(_to_device(blocks, cache)),
            _mask(visible, cache)[:, None],
        )


def _chunk(batch: Batch, index: int, first_token: int, cache: KVCache, window: int | None) -> Chunk:
    table, size = batch.table, cache.block_size
    row, num_new = batch.rows[index], int(batch.num_new_tokens[index])
    start = int(table.num_computed_tokens[row])
    first_seen = 0 if window is None else max(start - window + 1, 0)
    first_block = first_seen // size
    blocks = table.block_table[row, first_block : -(-(start + num_new) // size)]
    queries = (
        _query_block(first_token, start, begin, min(begin + _QUERY_TOKENS, num_new), first_block * size, cache, window)
        for begin in range(0, num_new, _QUERY_TOKENS)
    )
    return Chunk(cache.gather_rows(_to_device(blocks[None], cache)), tuple(queries))


def _query_block(
    first_token: int, start: int, begin: int, end: int, first_key: int, cache: KVCache, window: int | None
) -> QueryBlock:
    """Tokens begin .. end of a chunk that starts at position `start`; its first gathered key is at `first_key`."""
    positions = np.arange(start + begin, start + end)[:, None]
    first_masked = start + begin if window is None else first_key  # without a window all earlier keys are visible
    key_positions = np.arange(first_masked, start + end)
    visible = key_positions <= positions
    if window is not None:
        visible &= key_positions > positions - window
    return QueryBlock(first_token + begin, first_token + end, start + end - first_key, _mask(visible, cache))


def _mask(visible: npt.NDArray[np.bool_], cache: KVCache) -> Tensor:
    mask = np.where(visible, np.float32(0), np.float32(-np.inf))
    return torch.from_numpy(mask).to(cache.data.device)


def _to_device(array: npt.NDArray[np.integer], cache: KVCache) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(cache.data.device)
