"""What computes a step: the transformer with its weights and its KV cache, on the device where these are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles, EngineSpec
from asyncscale.engine.batch import Batch
from asyncscale.errors import ModelLoadError
from asyncscale.kernels.library import load_library
from asyncscale.model.expert_exchange import RowGroup
from asyncscale.model.torch_devices import has_gpu
from asyncscale.progress import Progress

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Report = Callable[[str, float], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The new tokens of a step, T in all: the batch's rows one after the other, each row's in order.

    token_ids, positions: int32[T]. rows: int32[T], of the batch's table, one for each token. cos, sin: float32[T,
    head_dim / 2], of RotaryEmbedding. All are contiguous.
    """

    batch: Batch
    token_ids: Int32
    positions: Int32
    rows: Int32
    cos: Float32
    sin: Float32


class Decoder(Protocol):
    """From tokens to logits. Called from one thread.

    ::

        decoder.forward(step)
        logits = decoder.logits(np.array([0, 5]))      # of the step's tokens 0 and 5

    dtype: of weights and KV cache, by its name. num_blocks: of the KV cache. num_threads: that compute.
    rope_factors: divisors of RoPE's frequencies that the checkpoint holds, float32[head_dim / 2].
    token_cost: see engine.runner.Runner; infinite where logits depend on what else is computed beside them.
    progress: where ticks are counted while a step is computed, at least one in each layer; may be set.
    use_weights: computes with other weights from now on, which `load_weights` has returned; those before are freed.
    """

    dtype: str
    num_blocks: int
    num_threads: int
    token_cost: float
    rope_factors: Float32 | None
    progress: Progress

    def load_weights(self, files: CheckpointFiles, progress: Callable[[float], None]) -> Any:
        """The weights of other files of this architecture. From any thread. Raises ModelLoadError."""

    def use_weights(self, weights: Any) -> None: ...

    def forward(self, step: StepTokens) -> None:
        """Compute the hidden states of all tokens, kept until the next call; keys and values go to the cache.

        There may be no tokens. Where the experts are spread over engines, this is collective; it may raise
        CollectiveError, and the same step may then be computed again.
        """

    def logits(self, indices: Int64) -> Float32:
        """float32[n, vocab_size], contiguous, of tokens of the last step; indices: int64[n], each less than T.

        The caller may overwrite it; it is valid until the next call of this or of forward.
        """

    def best(self, indices: Int64) -> tuple[Int64, Float32]:
        """What `first_highest` says of these tokens' logits, without the logits."""


def first_highest(logits: Float32) -> tuple[Int64, Float32]:
    """The first highest logit of each row: where it is, and its value (not a number when the row holds such).

    logits: float32[m, V]. Returns int64[m] and float32[m].
    """
    token_ids = logits.argmax(1)
    return token_ids, logits[np.arange(len(logits)), token_ids]


def make_decoder(
    spec: EngineSpec,
    files: CheckpointFiles,
    model: ModelConfig,
    max_model_len: int,
    report: Report,
    group: RowGroup | None = None,
) -> Decoder:
    """The decoder for this machine, its weights loaded. report: is called with a stage's name and its fraction done.

    group: the engines that the experts are dealt out to, where they are.
    Raises ModelLoadError where the checkpoint cannot be read or there is not enough memory.
    """
    if not has_gpu():
        library = load_library()
        if library is not None:
            from asyncscale.model.native_decoder import NativeDecoder

            _log.info("native kernels for %s, threads: %s", library.isa, spec.config.threads_per_engine)
            return NativeDecoder(library, spec, files, model, max_model_len, report, group)
        if spec.engine_id == 0 and spec.incarnation == 0:  # once for all engines, and not again at restarts
            _log.warning(
                "asyncscale was installed without its native kernels (no C++ compiler?): "
                "the model is computed in torch, which is several times slower"
            )
    if spec.config.quantization is not None:
        raise ModelLoadError(
            f"quantization={spec.config.quantization!r} needs the native kernels, which compute on CPUs only, "
            "and which an installation with a C++ compiler has"
        )
    from asyncscale.model.torch_decoder import TorchDecoder

    return TorchDecoder(spec, files, model, max_model_len, report, group)
