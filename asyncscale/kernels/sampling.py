"""The door to the sampling kernels, and what they have in common with their twin in numpy."""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from asyncscale.kernels.library import Library, load_library

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

# Draw of sampling.cpp: one token to draw. index: its row of the logits. uniform: in [0, 1). highest: the row's logit.
# top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
DRAW = np.dtype(
    [
        ("index", "i8"), ("uniform", "f8"), ("top_p", "f8"), ("top_k", "i8"),
        ("temperature", "f4"), ("min_p", "f4"), ("highest", "f4"), ("unused", "i4"),
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LogProbabilities:
    """Of m rows: a token's, float32[m], and its rank; and those of the n most likely tokens, float32[m, n]."""

    chosen: Float32
    ranks: Int64
    top_ids: Int64
    top: Float32


class SamplingKernels(Protocol):
    """Draws tokens from logits, and reports on them; a row's results do not depend on the rows beside it.

    logits: float32[m, V], contiguous; they are left as they are.
    """

    def draw(self, logits: Float32, draws: npt.NDArray[np.void]) -> Int64:
        """A token for each of `draws` (of dtype DRAW), by inversion of the cumulative distribution in token-id order.

        The tokens that may come are those of min_p, of these top_k, of these top_p, each with the equals of the last
        one that stays; a token of probability zero never comes. Rows must not hold NaN or plus infinity.
        """

    def log_probabilities(self, logits: Float32, indices: Int64, token_ids: Int64, num_top: int) -> LogProbabilities:
        """Log-softmax of the rows `indices`, at their `token_ids` and the `num_top` highest, the lower id first among
        equals. The rank of a token is 1 + the number of more likely ones.
        """


class NativeSampling:
    """SamplingKernels in the native library.

    ::

        sampling = load_sampling(vocab_size)
        token_ids = sampling.draw(logits, draws)
    """

    def __init__(self, library: Library, vocab_size: int) -> None:
        cdll = library.cdll
        self._draw = cdll.asyncscale_draw
        self._draw.argtypes, self._draw.restype = (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p), None
        self._log_probabilities = cdll.asyncscale_log_probabilities
        self._log_probabilities.argtypes = (
            *(c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p),
            *(c_void_p, c_void_p, c_void_p, c_void_p),
        )
        self._log_probabilities.restype = None
        scratch_bytes = cdll.asyncscale_sampling_scratch_bytes
        scratch_bytes.argtypes, scratch_bytes.restype = (c_int64,), c_int64
        self._vocab_size = vocab_size
        self._scratch = np.empty(scratch_bytes(vocab_size) // 8 + 1, np.float64)

    def draw(self, logits: Float32, draws: npt.NDArray[np.void]) -> Int64:
        """See SamplingKernels."""
        self._check(logits)
        token_ids = np.empty(len(draws), np.int64)
        self._draw(
            logits.ctypes.data, self._vocab_size, draws.ctypes.data, len(draws), self._scratch.ctypes.data,
            token_ids.ctypes.data,
        )  # fmt: skip
        return token_ids

    def log_probabilities(self, logits: Float32, indices: Int64, token_ids: Int64, num_top: int) -> LogProbabilities:
        """See SamplingKernels."""
        self._check(logits)
        size = len(indices)
        result = LogProbabilities(
            np.empty(size, np.float32),
            np.empty(size, np.int64),
            np.empty((size, num_top), np.int64),
            np.empty((size, num_top), np.float32),
        )
        arrays = (result.chosen, result.ranks, result.top_ids, result.top)
        self._log_probabilities(
            logits.ctypes.data, self._vocab_size, indices.ctypes.data, token_ids.ctypes.data, size, num_top,
            self._scratch.ctypes.data, *(array.ctypes.data for array in arrays),
        )  # fmt: skip
        return result

    def _check(self, logits: Float32) -> None:
        if logits.shape[1:] != (self._vocab_size,) or logits.dtype != np.float32 or not logits.flags.c_contiguous:
            raise ValueError(f"logits must be contiguous float32[m, {self._vocab_size}], got {logits.shape}")


def load_sampling(vocab_size: int) -> NativeSampling | None:
    """The kernels for this CPU; None where the library was not built."""
    library = load_library()
    return None if library is None else NativeSampling(library, vocab_size)
