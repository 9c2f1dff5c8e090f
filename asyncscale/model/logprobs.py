"""Log-probabilities of chosen and of most likely tokens, from raw logits, as they are reported."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from asyncscale.kernels.sampling import SamplingKernels
from asyncscale.messages import TokenLogprobs


def token_logprobs(
    kernels: SamplingKernels,
    logits: npt.NDArray[np.float32],
    indices: npt.NDArray[np.int64],
    token_ids: npt.NDArray[np.integer],
    num_top: npt.NDArray[np.int32],
) -> list[TokenLogprobs]:
    """Of each of the rows `indices` its chosen token first, then its `num_top` most likely ones.

    logits: float32[m, V], before any processing. indices, token_ids, num_top: integers[k].
    """
    if not len(indices):
        return []
    found = kernels.log_probabilities(logits, indices, token_ids.astype(np.int64), int(num_top.max()))
    chosen, ranks, ids, values = found.chosen.tolist(), found.ranks.tolist(), found.top_ids, found.top
    return [
        TokenLogprobs([token_id, *ids[i, :num].tolist()], [chosen[i], *values[i, :num].tolist()], ranks[i])
        for i, (token_id, num) in enumerate(zip(token_ids.tolist(), num_top.tolist(), strict=True))
    ]
