"""Log-probabilities of chosen and of most likely tokens, from raw logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from asyncscale.engine.batch import Int32
from asyncscale.messages import TokenLogprobs

Float32 = npt.NDArray[np.float32]

_CHUNK = 64  # rows whose log-probabilities are held at once
_MIN_LISTED = 64  # so many are listed at least, so that equally likely ones can be put in order of token id


def prompt_logprobs(logits: Float32, token_ids: Int32, num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of `token_ids` (of a prompt) and of the `num_top` most likely tokens at each position.

    logits: float32[k, V], row i from the position before token_ids[i]. token_ids: int32[k]. One TokenLogprobs per row.
    """
    entries: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), _CHUNK):
        chosen = token_ids[start : start + _CHUNK]
        logprobs = log_probabilities(logits[start : start + _CHUNK])
        entries += token_logprobs(logprobs, chosen, np.full(len(chosen), num_top, np.int32))
    return entries


def log_probabilities(logits: Float32) -> Float32:
    """float32[k, V]: log-softmax of raw logits, before any processing, as vLLM reports it. Leaves `logits` alone."""
    with np.errstate(invalid="ignore", divide="ignore"):  # a row that holds no numbers is an error elsewhere
        shifted = logits - logits.max(1, keepdims=True)
        logprobs: Float32 = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logprobs


def token_logprobs(logprobs: Float32, token_ids: npt.NDArray[np.integer], num_top: Int32) -> list[TokenLogprobs]:
    """Of each row its chosen token first, then its `num_top` most likely ones, the lower id first among equals.

    logprobs: float32[k, V]. token_ids: integers[k]. num_top: int32[k].
    The rank of a token is 1 + the number of more likely ones.
    """
    rows = np.arange(len(token_ids))
    chosen = logprobs[rows, token_ids]
    ranks = 1 + np.count_nonzero(logprobs > chosen[:, None], axis=1)
    most = int(num_top.max())
    ids = _most_likely(logprobs, most)
    values = np.take_along_axis(logprobs, ids, 1)
    return [
        TokenLogprobs(
            [int(token_ids[i]), *ids[i, :num].tolist()], [float(chosen[i]), *values[i, :num].tolist()], int(ranks[i])
        )
        for i, num in enumerate(num_top.tolist())
    ]


def _most_likely(logprobs: Float32, count: int) -> npt.NDArray[np.int64]:
    """The ids of each row's `count` most likely tokens, in order; the lower id first among equals."""
    num_listed = min(max(count, _MIN_LISTED), logprobs.shape[1])
    if count < 1:
        return np.empty((len(logprobs), 0), np.int64)
    ids = np.argpartition(-logprobs, num_listed - 1, axis=1)[:, :num_listed]
    order = np.lexsort((ids, -np.take_along_axis(logprobs, ids, 1)))[:, :count]
    return np.take_along_axis(ids, order, 1)
