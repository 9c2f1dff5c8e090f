"""The decoder in the native library: a step of all layers is one foreign call. Imports no torch."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from asyncscale.checkpoint.experts_config import ExpertsConfig
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.checkpoint.weight_counts import WeightCounts
from asyncscale.config import CheckpointFiles, EngineConfig, EngineSpec
from asyncscale.engine.batch import Batch
from asyncscale.errors import ModelLoadError
from asyncscale.kernels import library as native
from asyncscale.kernels.library import FORMATS, Format, Library
from asyncscale.memory import available_memory
from asyncscale.model.cache_size import num_cache_blocks
from asyncscale.model.decoder import Report, StepTokens
from asyncscale.model.expert_exchange import ExpertExchange, ExpertShare, RowGroup
from asyncscale.model.file_lock import remove_unless_used
from asyncscale.model.packing import head_format
from asyncscale.model.threads import num_threads
from asyncscale.model.weight_cache import PackedWeights, packed_weights
from asyncscale.progress import Progress

if TYPE_CHECKING:
    from asyncscale.model.native_exchange import NativeExchange

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

# Rows (tokens times the query heads that share a key head) attended to together: they share the reading of keys and
# values, and their sums stay in the second-level cache.
_ROWS_TOGETHER = 96
# A step of SmolLM2 takes 6.5 ms and 0.8 for each token in bfloat16, 3.5 and 0.5 in int8 (one AVX-512 core). Where there
# are experts, a token's have to be read, too.
_TOKEN_COST = 0.14
_UNLIMITED = 1 << 40  # a window beyond every context
_LANES = 16  # rows of float32 are padded to multiples of it


class NativeDecoder:
    """A Decoder of decoder.py.

    What is computed of a token is bitwise the same whatever else is in the step. The residual stream, norms, softmax
    and logits are float32; inputs of products have the weights' type (in int8: quantized, each row by its largest
    magnitude).
    """

    _passing_path: Path | None = None

    def __init__(
        self,
        library: Library,
        spec: EngineSpec,
        files: CheckpointFiles,
        model: ModelConfig,
        max_model_len: int,
        report: Report,
        group: RowGroup | None = None,
    ) -> None:
        """group: the engines that the experts are dealt out to; None: all are here."""
        self._library = library
        weight_format, cache_format = formats(spec.config, library)
        self.dtype: str = weight_format
        counts = WeightCounts.of(model)
        self.token_cost = _TOKEN_COST + counts.per_token / counts.every_step
        self._architecture, self._weight_format = model, weight_format
        weights = self.load_weights(files, lambda fraction: report("weights", fraction))
        self.rope_factors = weights.rope_factors
        self._share: ExpertShare | None = None
        self._exchange: NativeExchange | None = None
        if group is not None and model.experts is not None:
            # Imported here, as it needs torch.
            from asyncscale.model.native_exchange import NativeExchange

            exchange = ExpertExchange(group, model.experts.num_experts)
            self._share, self._exchange = exchange.share, NativeExchange(exchange)
        self.use_weights(weights)
        self._cache = native.Cache(
            format=FORMATS[cache_format],
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            block_size=spec.config.block_size,
        )
        block_bytes = library.cdll.asyncscale_block_bytes(self._cache)
        self.num_blocks = num_cache_blocks(spec, max_model_len, block_bytes, available_memory())
        self._cache_memory = _lazy_zeros(self.num_blocks * block_bytes)
        self._cache.data = self._cache_memory.ctypes.data
        self._team = library.cdll.asyncscale_team_new(num_threads(spec))
        self.num_threads: int = library.cdll.asyncscale_team_size(self._team)
        self._most_tokens = max(_ROWS_TOGETHER * model.num_kv_heads // model.num_heads, 1)
        self._hidden_size = _padded(model.hidden_size)
        self._vocab_size = model.vocab_size
        self.durations: npt.NDArray[np.uint64] = np.zeros(len(native.PHASES), np.uint64)
        self._step = native.Step(most_tokens=self._most_tokens, durations=self.durations.ctypes.data)
        if self._exchange is not None:
            self._step.exchange = ctypes.pointer(self._exchange.structure)
        self._workspace: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._hidden: Float32 = np.zeros((0, self._hidden_size), np.float32)
        self._decode_items: Int64 = np.ones((0, 4), np.int64)
        self._logits: Float32 = np.zeros((0, self._model.head.num_outputs), np.float32)
        self._reserve(spec.config.max_num_batched_tokens)
        self.progress = Progress()

    @property
    def progress(self) -> Progress:
        """Where ticks are counted while a step is computed; may be set."""
        return self._progress

    @progress.setter
    def progress(self, progress: Progress) -> None:
        self._progress = progress
        self._step.ticks = progress.ticks_address

    def load_weights(self, files: CheckpointFiles, progress: Callable[[float], None]) -> PackedWeights:
        """The weights of `files`, for `use_weights`. From any thread."""
        return packed_weights(files, self._architecture, self._weight_format, progress)

    def use_weights(self, weights: PackedWeights) -> None:
        """Compute with these from now on; those before are freed."""
        before, self._passing_path = self._passing_path, weights.passing_path
        self._model = _Model(self._architecture, weights.tensors, self._weight_format, self._share)
        if before is not None and before != self._passing_path:
            remove_unless_used(before)  # the last engine that has it does

    def forward(self, step: StepTokens) -> None:
        """Compute the hidden states of all tokens, kept until the next call; keys and values go to the cache.

        Raises what the exchange with the other engines raised: then there are no hidden states, and the same step may
        be computed again.
        """
        num_tokens = len(step.token_ids)
        if num_tokens > len(self._hidden):
            self._reserve(num_tokens)
        items = self._items_of(step)
        table = step.batch.table.block_table
        fields = self._step
        fields.num_tokens = num_tokens
        fields.token_ids = step.token_ids.ctypes.data
        fields.positions = step.positions.ctypes.data
        fields.rows = step.rows.ctypes.data
        fields.cos, fields.sin = step.cos.ctypes.data, step.sin.ctypes.data
        fields.block_table, fields.block_table_stride = table.ctypes.data, table.shape[1]
        fields.items, fields.num_items = items.ctypes.data, len(items)
        done = self._library.cdll.asyncscale_forward(self._model, self._cache, fields, self._team)
        if not done and self._exchange is not None:
            self._exchange.raise_failure()

    def logits(self, indices: Int64) -> Float32:
        """float32[n, vocab_size] of tokens of the last step; valid until the next call."""
        if len(indices) > len(self._logits):
            self._logits = np.empty((len(indices), self._logits.shape[1]), np.float32)
        self._library.cdll.asyncscale_logits(
            self._model, self._step, indices.ctypes.data, len(indices), self._logits.ctypes.data, self._team
        )
        logits = self._logits[: len(indices), : self._vocab_size]
        return logits if logits.flags.c_contiguous else logits.copy()

    def best(self, indices: Int64) -> tuple[Int64, Float32]:
        """The first highest logit's token of each, and that logit; the logits themselves are not kept."""
        num_rows = len(indices)
        partial = np.empty((2, self.num_threads, num_rows, _LANES), np.float32)  # values, and integers as large
        token_ids, highest = np.empty(num_rows, np.int64), np.empty(num_rows, np.float32)
        self._library.cdll.asyncscale_best(
            self._model, self._step, indices.ctypes.data, num_rows, self._vocab_size, partial[0].ctypes.data,
            partial[1].ctypes.data, highest.ctypes.data, token_ids.ctypes.data, self._team,
        )  # fmt: skip
        return token_ids, highest

    def _items_of(self, step: StepTokens) -> Int64:
        """What threads attend to together: int64[n, 4] of (first token, number of tokens, its position, row)."""
        batch = step.batch
        if batch.num_decodes < len(batch.rows) or batch.num_drafts is not None:
            return _items(batch, self._most_tokens)
        items = self._decode_items[: len(batch.rows)]
        items[:, 2], items[:, 3] = step.positions, step.rows
        return items

    def _reserve(self, num_tokens: int) -> None:
        """Make room for steps of so many tokens."""
        self._hidden = np.zeros((num_tokens, self._hidden_size), np.float32)
        self._decode_items = np.ones((num_tokens, 4), np.int64)
        self._decode_items[:, 0] = np.arange(num_tokens)
        num_bytes = self._library.cdll.asyncscale_workspace_bytes(
            self._model, num_tokens, self._most_tokens, self.num_threads
        )
        self._workspace = np.zeros(num_bytes + 64, np.uint8)
        self._step.hidden = self._hidden.ctypes.data
        self._step.workspace = self._workspace.ctypes.data + -self._workspace.ctypes.data % 64


class _Model(native.Model):
    """The library's picture of the model; keeps the arrays alive whose addresses it holds.

    share: of the experts, which this engine computes; None is all. The arrays have all of them, but are a file that the
    engines of a host map together: the share is what this engine reads of it.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, npt.NDArray[Any]],
        weight_format: Format,
        share: ExpertShare | None = None,
    ) -> None:
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        num_qkv = heads + 2 * config.num_kv_heads * config.head_dim

        def address(name: str, first: int = 0) -> int | None:
            return tensors[name][first:].ctypes.data if name in tensors else None

        def linear(
            name: str, num_outputs: int, num_inputs: int, format: Format = weight_format, first_expert: int = 0
        ) -> native.Linear:
            return native.Linear(
                weights=address(f"{name}.weight", first_expert),
                scales=address(f"{name}.scales", first_expert),
                bias=address(f"{name}.bias"),
                num_outputs=_padded(num_outputs),
                num_inputs=num_inputs,
                format=FORMATS[format],
            )

        def how_to_route(name: str, experts: ExpertsConfig) -> native.Experts:
            return native.Experts(
                router=linear(f"{name}.router", experts.num_experts, hidden, "float32"),
                num_experts=experts.num_experts,
                num_held=experts.num_experts if share is None else len(share),
                num_experts_per_token=experts.num_experts_per_token,
                normalizes=experts.normalizes,
            )

        layers = (native.Layer * config.num_layers)()
        for i, window in enumerate(config.layer_windows):
            name = f"layers.{i}"
            experts = config.experts_of(i)
            mlp = f"{name}.experts" if experts else name
            inner = _padded(experts.intermediate_size if experts else config.intermediate_size)
            first = share.first if experts and share else 0
            layers[i] = native.Layer(
                qkv=linear(f"{name}.qkv", num_qkv, hidden),
                output=linear(f"{name}.o", hidden, heads),
                gate_up=linear(f"{mlp}.gate_up", 2 * inner, hidden, first_expert=first),
                down=linear(f"{mlp}.down", hidden, inner, first_expert=first),
                experts=how_to_route(name, experts) if experts else native.Experts(),
                input_norm=address(f"{name}.input_norm"),
                post_attention_norm=address(f"{name}.post_attention_norm"),
                qk_norm=address(f"{name}.qk_norm"),
                window=_UNLIMITED if window is None else window,
            )
        super().__init__(
            layers=layers,
            num_layers=config.num_layers,
            hidden_size=hidden,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            embedding=address("embedding"),
            embedding_format=FORMATS["bfloat16" if weight_format == "int8" else weight_format],
            norm=address("norm"),
            head=linear("head", config.vocab_size, hidden, head_format(weight_format)),
            eps=config.rms_norm_eps,
            qkv_limit=math.inf if config.qkv_limit is None else config.qkv_limit,
            qk_norm_spans_heads=config.qk_norm_spans_heads,
        )
        self._tensors = tensors


def _padded(size: int) -> int:
    """Of a row of float32."""
    return -(-size // _LANES) * _LANES


def formats(config: EngineConfig, library: Library) -> tuple[Format, Format]:
    """Of weights and of the KV cache."""
    dtype: Format = config.dtype if config.dtype != "auto" else "bfloat16" if library.multiplies_bfloat16 else "float32"
    return config.quantization or dtype, dtype


def _items(batch: Batch, most_tokens: int) -> Int64:
    """Each sequence's new tokens, at most so many together."""
    counts = batch.num_new_tokens
    starts = batch.table.num_computed_tokens[batch.rows]
    num_items = -(-counts // most_tokens)
    sequences = np.repeat(np.arange(len(counts)), num_items)
    done = (np.arange(len(sequences)) - np.repeat(np.cumsum(num_items) - num_items, num_items)) * most_tokens
    first_tokens = np.cumsum(counts) - counts
    columns = (
        first_tokens[sequences] + done,
        np.minimum(counts[sequences] - done, most_tokens),
        starts[sequences] + done,
        batch.rows[sequences],
    )
    return np.column_stack(columns).astype(np.int64)


def _lazy_zeros(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Committed by the operating system as it is written; in large pages, as blocks are read from all over."""
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise ModelLoadError(f"cannot allocate {num_bytes:,} bytes for the KV cache: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
