"""Repetition, frequency and presence penalties, from counts that are kept up to date token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from asyncscale.engine.batch import Int32
from asyncscale.engine.request import Request
from asyncscale.model.token_counts import TokenCounts
from asyncscale.params import Sampling


def is_penalized(sampling: Sampling) -> bool:
    """Whether a request with this `sampling` penalizes anything."""
    return sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0


class RowPenalties:
    """One request's penalties and the tokens that they apply to. Prompt tokens that have no logit are left out."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        sampling = request.sampling
        prompt, generated = np.split(request.token_ids, [request.num_prompt_tokens])
        self.factors = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        # Only the repetition penalty looks at the prompt.
        self.counts = TokenCounts(prompt[prompt < vocab_size] if sampling.repetition_penalty != 1 else prompt[:0])
        self.counts.extend(generated)

    def update(self, generated: Int32) -> None:
        """Count what is new in `generated`, all tokens generated so far."""
        self.counts.extend(generated[self.counts.num_generated :])


def apply_penalties(logits: npt.NDArray[np.float32], indices: Sequence[int], penalties: Sequence[RowPenalties]) -> None:
    """Penalize tokens that occurred, in place.

    logits: float32[m, V]. indices: the rows of logits that the penalties belong to.
    Repetition (prompt and generated tokens): positive logits are divided by the penalty, others multiplied (Keskar et
    al., CTRL, arXiv:1909.05858, section 4.1, with transformers' rule for negative ones). Then, over generated tokens,
    logit -= count * frequency_penalty + (count > 0) * presence_penalty (OpenAI's API reference).
    """
    lengths = [len(row.counts.token_ids) for row in penalties]
    token_ids = np.concatenate([row.counts.token_ids for row in penalties])
    count = np.concatenate([row.counts.counts for row in penalties]).astype(np.float32)
    factors = np.repeat(np.array([row.factors for row in penalties], np.float32), lengths, axis=0)
    repetition, frequency, presence = factors.T
    at = np.repeat(np.asarray(indices), lengths), token_ids
    values = logits[at]
    values = np.where(values > 0, values / repetition, values * repetition)
    logits[at] = values - count * frequency - (count > 0) * presence
