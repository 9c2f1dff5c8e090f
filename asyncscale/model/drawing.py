"""Draws tokens from probability distributions: temperature, min_p, top_k and top_p for a whole batch at once.

All work is per row, so what a row draws does not depend on the rows beside it. Nothing is sorted unless a row asks for
top_k or top_p, and then the whole vocabulary only where its most likely tokens do not settle the matter.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

_NUM_CANDIDATES = (64, 4096)  # most likely tokens looked at first, then next, before all of them
_BLOCK = 128  # tokens summed at once on the way down the cumulative distribution
_BELOW_ONE = 1.0 - 2.0**-53


def draw(probabilities: Float32, uniforms: Float64) -> Int64:
    """One token per row by inversion of the cumulative distribution in token-id order.

    probabilities: float32[m, V], not negative, not all zero; rows need not sum to one. uniforms: float64[m] in [0, 1).
    Returns int64[m]; a token of probability zero is never drawn.

    Token-id order, because an order by probability would change with the rounding of near-equal logits.
    """
    num_rows, vocab_size = probabilities.shape
    if vocab_size % _BLOCK:
        probabilities = np.pad(probabilities, ((0, 0), (0, -vocab_size % _BLOCK)))
    blocks = probabilities.reshape(num_rows, -1, _BLOCK)
    block_sums = np.einsum("ijk->ij", blocks)  # four times as fast as sum(2)
    block, rest = _invert(block_sums.astype(np.float64), uniforms)
    token, _ = _invert(blocks[np.arange(num_rows), block].astype(np.float64), rest)
    return block * _BLOCK + token


def _invert(weights: Float64, uniforms: Float64) -> tuple[Int64, Float64]:
    """For each row: the index that its uniform falls on, and how far into that index it falls, again in [0, 1)."""
    rows = np.arange(len(weights))
    cumulative = np.cumsum(weights, axis=1)
    target = uniforms * cumulative[:, -1]
    index = (cumulative <= target[:, None]).sum(1)
    before = np.where(index > 0, cumulative[rows, index - 1], 0.0)
    # Rounding could make the quotient one.
    return index, np.clip((target - before) / weights[rows, index], 0.0, _BELOW_ONE)


def thresholds(probabilities: Float32, top_k: npt.NDArray[np.int32], top_p: Float64, min_p: Float32) -> Float32:
    """The least probability that a token needs to stay, per row: min_p first, of those top_k, of those top_p.

    probabilities: float32[m, V], rows sum to one. top_k: int32[m], 0 is off, else at most V.
    top_p: float64[m], 1 is off. min_p: float32[m], 0 is off. Returns float32[m].

    The sets are those of transformers' MinPLogitsWarper, TopKLogitsWarper and TopPLogitsWarper in that order, except
    that tokens as likely as the last one that top_p keeps are kept too, so that ties are not broken by chance.
    """
    vocab_size = probabilities.shape[1]
    floor: Float32 = min_p * probabilities.max(1)
    pending = np.flatnonzero((top_k > 0) | (top_p < 1))
    for count in (*_NUM_CANDIDATES, vocab_size):
        if not pending.size:
            break
        candidates = _largest(probabilities if pending.size == len(floor) else probabilities[pending], count)
        cut, settled = _cut(candidates, top_k[pending], top_p[pending], floor[pending], vocab_size)
        floor[pending[settled]] = cut[settled]
        pending = pending[~settled]
    return floor


def _largest(probabilities: Float32, count: int) -> Float32:
    """The `count` largest values of each row, descending."""
    vocab_size = probabilities.shape[1]
    if count < vocab_size:
        probabilities = np.partition(probabilities, vocab_size - count, axis=1)[:, -count:]
    return np.flip(np.sort(probabilities, axis=1), axis=1)


def _cut(
    candidates: Float32, top_k: npt.NDArray[np.int32], top_p: Float64, floor: Float32, vocab_size: int
) -> tuple[Float32, Bool]:
    """Thresholds found from each row's most likely tokens (descending), and whether those were enough to find them."""
    rows, count = np.arange(len(candidates)), candidates.shape[1]
    kth_known = top_k <= count
    kth = candidates[rows, np.minimum(top_k, count) - 1]
    floor = np.where((top_k > 0) & kth_known, np.maximum(floor, kth), floor)

    kept = np.where(candidates >= floor[:, None], candidates, 0).astype(np.float64)
    cumulative = np.cumsum(kept, axis=1)
    all_listed = (candidates[:, -1] < floor) | (count == vocab_size)
    unrestricted = (top_k == 0) & (floor == 0)
    target = top_p * np.where(all_listed, cumulative[:, -1], 1.0)
    num_kept = np.minimum((cumulative < target[:, None]).sum(1), count - 1)  # less the one that reaches the target
    top_p_known = all_listed | (unrestricted & (cumulative[:, -1] >= target))
    settled = kth_known & (top_p_known | (top_p >= 1))
    return np.where(top_p < 1, np.maximum(floor, candidates[rows, num_kept]), floor), settled
