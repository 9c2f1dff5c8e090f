"""Drawing and log-probabilities in numpy, for installations without the native library."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from asyncscale.kernels.sampling import LogProbabilities, SamplingKernels, load_sampling
from asyncscale.model.drawing import draw, thresholds

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

_ROWS = 64  # whose log-probabilities are held at once


class NumpySampling:
    """SamplingKernels of kernels/sampling.py."""

    def draw(self, logits: Float32, draws: npt.NDArray[np.void]) -> Int64:
        """See SamplingKernels."""
        weights = logits[draws["index"]]
        weights -= draws["highest"][:, None]
        weights /= draws["temperature"][:, None]
        np.exp(weights, out=weights)
        weights /= weights.sum(1, keepdims=True)
        top_k, top_p, min_p = draws["top_k"], draws["top_p"], draws["min_p"]
        if np.any((top_k > 0) | (top_p < 1) | (min_p > 0)):
            least = thresholds(weights, top_k, top_p, min_p)
            np.multiply(weights, weights >= least[:, None], out=weights)
        return draw(weights, draws["uniform"])

    def log_probabilities(self, logits: Float32, indices: Int64, token_ids: Int64, num_top: int) -> LogProbabilities:
        """See SamplingKernels."""
        parts = [
            _log_probabilities(logits[indices[begin : begin + _ROWS]], token_ids[begin : begin + _ROWS], num_top)
            for begin in range(0, max(len(indices), 1), _ROWS)
        ]
        columns = zip(*((part.chosen, part.ranks, part.top_ids, part.top) for part in parts), strict=True)
        return LogProbabilities(*(np.concatenate(column) for column in columns))


def make_sampling_kernels(vocab_size: int) -> SamplingKernels:
    """The native kernels where they were built, else numpy."""
    return load_sampling(vocab_size) or NumpySampling()


def _log_probabilities(logits: Float32, token_ids: Int64, num_top: int) -> LogProbabilities:
    chosen = logits[np.arange(len(token_ids)), token_ids]
    ranks = 1 + np.count_nonzero(logits > chosen[:, None], axis=1)
    top_ids = np.array([_most_likely(row, num_top) for row in logits]).reshape(len(logits), num_top)
    top = np.take_along_axis(logits, top_ids, 1)
    with np.errstate(invalid="ignore", divide="ignore"):  # a row that holds no numbers is an error elsewhere
        highest = logits.max(1, keepdims=True, initial=-np.inf)
        log_sum = np.log(np.exp(logits - highest).sum(1, keepdims=True))
        return LogProbabilities(chosen - (highest + log_sum)[:, 0], ranks, top_ids, top - highest - log_sum)


def _most_likely(row: Float32, count: int) -> Int64:
    """The ids of a row's `count` highest logits, in order; the lower id first among equals."""
    values = np.where(np.isnan(row), -np.inf, row)
    ids = np.flatnonzero(values >= np.partition(values, -count)[-count]) if count else np.empty(0, np.int64)
    return ids[np.argsort(-values[ids], kind="stable")][:count]
