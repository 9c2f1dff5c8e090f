"""Log-probabilities of chosen and of most likely tokens, from raw logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncscale.engine.batch import Int32
from asyncscale.messages import TokenLogprobs

_CHUNK = 64  # rows whose log-probabilities are held at once
_MIN_LISTED = 64  # so many are listed at least, so that equally likely ones can be put in order of token id


def prompt_logprobs(logits: Tensor, token_ids: Int32, num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of `token_ids` (of a prompt) and of the `num_top` most likely tokens at each position.

    logits: float[k, V], row i from the position before token_ids[i]. token_ids: int32[k]. One TokenLogprobs per row.
    """
    entries: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), _CHUNK):
        chosen = token_ids[start : start + _CHUNK]
        logprobs = log_probabilities(logits[start : start + _CHUNK])
        entries += token_logprobs(logprobs, chosen, np.full(len(chosen), num_top, np.int32))
    return entries


def log_probabilities(logits: Tensor) -> Tensor:
    """float32[k, V]: log-softmax of raw logits, before any processing, as vLLM reports it. Leaves `logits` alone."""
    return torch.log_softmax(logits, 1, dtype=torch.float32)


def token_logprobs(logprobs: Tensor, token_ids: npt.NDArray[np.integer], num_top: Int32) -> list[TokenLogprobs]:
    """Of each row its chosen token first, then its `num_top` most likely ones, the lower id first among equals.

    logprobs: float32[k, V]. token_ids: integers[k]. num_top: int32[k].
    The rank of a token is 1 + the number of more likely ones.
    """
    most = int(num_top.max())
    num_listed = min(max(most, _MIN_LISTED), logprobs.shape[1]) if most else 0
    values, ids = (tensor.cpu().numpy() for tensor in logprobs.topk(num_listed, 1))
    order = np.lexsort((ids, -values))[:, :most]
    values, ids = np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)
    everything = logprobs.cpu().numpy()
    chosen = everything[np.arange(len(token_ids)), token_ids]
    return [
        TokenLogprobs(
            [int(token_ids[i]), *ids[i, :num].tolist()],
            [float(chosen[i]), *values[i, :num].tolist()],
            1 + int(np.count_nonzero(everything[i] > chosen[i])),
        )
        for i, num in enumerate(num_top.tolist())
    ]
