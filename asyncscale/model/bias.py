"""What some requests add to their logits: logit_bias, and minus infinity for tokens that must not come next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from asyncscale.engine.batch import Int32
from asyncscale.params import Sampling


def is_biased(sampling: Sampling) -> bool:
    """Whether a request with this `sampling` ever adds anything to its logits."""
    return bool(
        sampling.logit_bias or sampling.bad_words_token_ids or (sampling.min_tokens and sampling.stop_token_ids)
    )


def apply_bias(
    logits: npt.NDArray[np.float32], indices: Sequence[int], samplings: Sequence[Sampling], generated: list[Int32]
) -> None:
    """Add to `logits` in place what `samplings` say, as vLLM does: logit_bias; stop tokens are banned before
    min_tokens; a bad word bans its last token where the generated tokens (not the prompt's) end with its others.

    logits: float32[m, V]. indices: the rows of logits that the samplings belong to.
    generated: of each, all tokens generated so far.
    """
    entries = [
        (index, token_id, value)
        for index, sampling, tokens in zip(indices, samplings, generated, strict=True)
        for token_id, value in _biases(sampling, tokens)
    ]
    if entries:
        rows, token_ids, values = zip(*entries, strict=True)
        np.add.at(logits, (rows, token_ids), np.array(values, np.float32))


def _biases(sampling: Sampling, generated: Int32) -> Iterator[tuple[int, float]]:
    yield from sampling.logit_bias
    if len(generated) < sampling.min_tokens:
        yield from ((token_id, -np.inf) for token_id in sampling.stop_token_ids)
    if sampling.bad_words_token_ids:
        longest = max(map(len, sampling.bad_words_token_ids))
        tail = tuple(generated[-longest:].tolist())
        for word in sampling.bad_words_token_ids:
            num_before = len(word) - 1
            if num_before <= len(tail) and tail[len(tail) - num_before :] == word[:-1]:
                yield word[-1], -np.inf
