"""Tiny random models in the native decoder, of any shape and format; and what they should compute, in plain float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from asyncscale.checkpoint.experts_config import ExpertsConfig
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.engine.batch import Batch, SequenceTable
from asyncscale.kernels.library import INSTRUCTION_SETS, load_library
from asyncscale.model.decoder import StepTokens
from asyncscale.model.native_decoder import NativeDecoder
from asyncscale.model.packing import Packer, packed_specs
from asyncscale.model.rope import RotaryEmbedding
from asyncscale.model.weights import weight_shapes

Array = np.ndarray[Any, Any]
ISAS = tuple(isa for isa in INSTRUCTION_SETS if load_library(isa))
NUM_ROWS, MAX_LEN = 8, 512


def tiny(**sizes: Any) -> ModelConfig:
    """A model's configuration; none of the sizes is a multiple of what it is padded to."""
    common: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 83, "hidden_size": 50, "intermediate_size": 43,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 34,
        "max_position_embeddings": MAX_LEN, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return ModelConfig.parse(common | sizes, "test")


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Array]:
    """float32, such that all activations are about as large as one another."""
    generator = np.random.default_rng(seed)

    def make(name: str, shape: tuple[int, ...]) -> Array:
        noise = generator.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            return 1 + np.float32(0.2) * noise
        if name.endswith(".bias") or "embed_tokens" in name:
            return noise
        # Queries and keys twice as large, so that attention has favourites.
        return noise * np.float32((2 if "q_proj" in name or "k_proj" in name else 1) / np.sqrt(shape[-1]))

    return {name: make(name, shape) for name, shape in weight_shapes(config).items()}


class Model:
    """A decoder of `weights`, which are float32 under Hugging Face's names, and up to 8 sequences in its cache.

    ::

        model.start(row, token_ids, blocks)        # blocks: of the cache, for all its tokens
        logits = model.step({row: 5, other: 1})    # so many tokens of each, those not computed yet

    num_steps: that were made so far.

    All memory that it may use is filled with bytes of 255 at first, which are no numbers in any format.
    """

    def __init__(self, decoder: NativeDecoder, config: ModelConfig, block_size: int) -> None:
        self.decoder = decoder
        self.num_blocks = decoder.num_blocks
        self.block_size = block_size
        self.num_steps = 0
        self._table = SequenceTable(NUM_ROWS, MAX_LEN, block_size)
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, None)
        decoder._cache_memory[:] = 255
        decoder._workspace[:] = 255
        decoder._hidden.view(np.uint8)[:] = 255

    def start(self, row: int, token_ids: Sequence[int], blocks: Sequence[int]) -> None:
        assert len(blocks) * self.block_size >= len(token_ids)
        self._table.token_ids[row, : len(token_ids)] = token_ids
        self._table.num_tokens[row] = self._table.num_prompt_tokens[row] = len(token_ids)
        self._table.block_table[row] = -1
        self._table.block_table[row, : len(blocks)] = blocks
        self.set_computed(row, 0)

    def set_computed(self, row: int, num_tokens: int) -> None:
        self._table.num_computed_tokens[row] = num_tokens

    def step(self, counts: dict[int, int]) -> dict[int, Array]:
        """The logits of all new tokens, by row."""
        rows, new = np.array(list(counts), np.int32), np.array(list(counts.values()), np.int32)
        starts = self._table.num_computed_tokens[rows]
        positions = np.concatenate([np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, new, strict=True)])
        of_tokens = np.repeat(rows, new)
        cos, sin = self._rotary.cos_sin(positions, positions + 1)
        batch = Batch(self._table, rows, new, num_decodes=len(rows) if (new == 1).all() else 0)
        token_ids = self._table.token_ids[of_tokens, positions]
        self.decoder.forward(StepTokens(batch, token_ids, positions, of_tokens, cos, sin))
        logits = self.decoder.logits(np.arange(len(positions))).copy()
        self._table.num_computed_tokens[rows] += new
        self.num_steps += 1
        return dict(zip(counts, np.split(logits, np.cumsum(new)[:-1]), strict=True))

    def step_without_tokens(self) -> None:
        none = np.empty(0, np.int32)
        cos, sin = self._rotary.cos_sin(none, none)
        self.decoder.forward(StepTokens(Batch(self._table, none, none), none, none, none, cos, sin))
        self.num_steps += 1

    def run(self, sequences: dict[int, Sequence[int]], chunks: Callable[[int], int], seed: int = 0) -> dict[int, Array]:
        """The logits of whole sequences, computed side by side in blocks at random; chunks(row): how many at a time.

        Each sequence's first chunk is one step later than that of the one before it.
        """
        free = np.random.default_rng(seed).permutation(self.num_blocks).tolist()
        for row, token_ids in sequences.items():
            self.start(row, token_ids, [free.pop() for _ in range(-(-len(token_ids) // self.block_size))])
        left = {row: len(token_ids) for row, token_ids in sequences.items()}
        results: dict[int, list[Array]] = {row: [] for row in sequences}
        begun = 0
        while left:
            begun += 1
            counts = {row: min(chunks(row), left[row]) for row in list(sequences)[:begun] if row in left}
            for row, logits in (self.step(counts) if counts else {}).items():
                results[row].append(logits)
                left[row] -= len(logits)
                if not left[row]:
                    del left[row]
        return {row: np.concatenate(logits) for row, logits in results.items()}


def packed(config: ModelConfig, weights: dict[str, Array], format: Any) -> dict[str, Array]:
    tensors = {name: np.zeros(spec.shape, spec.dtype) for name, spec in packed_specs(config, format).items()}
    packer = Packer(config, format, tensors)
    for name, values in weights.items():
        packer.write(name, values)
    if config.tie_word_embeddings:
        packer.write("lm_head.weight", weights["model.embed_tokens.weight"])
    return tensors


class Reference:
    """What the decoder should compute: in float64, but rounded where the format says that numbers are stored rounded.

    Weights of attention are not, as their roundings depend on the order of tiles.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Array], format: str, dtype: str = "float32") -> None:
        self._config = config
        self._format = format
        self._cache_format = dtype if format == "int8" else format
        self._embedding = rounded(weights["model.embed_tokens.weight"], "bfloat16" if format == "int8" else format)
        head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
        self._weights = {
            name: self._stored(name, values)
            for name, values in (weights | {"lm_head.weight": head}).items()
            if values.ndim == 2
        }
        self._vectors = {name: values.astype(np.float64) for name, values in weights.items() if values.ndim == 1}

    def logits(self, token_ids: Sequence[int]) -> Array:
        """float64[tokens, vocab_size]."""
        config = self._config
        x = self._embedding[np.array(token_ids)]
        cos, sin = RotaryEmbedding(config.rope, config.head_dim, None).cos_sin(
            np.arange(len(token_ids)), np.arange(len(token_ids)) + 1
        )
        for index, window in enumerate(config.layer_windows):
            layer = f"model.layers.{index}"
            normed = self._norm(x, f"{layer}.input_layernorm")
            x = x + self._linear(
                self._attend(normed, f"{layer}.self_attn", window, cos, sin), f"{layer}.self_attn.o_proj"
            )
            normed = self._norm(x, f"{layer}.post_attention_layernorm")
            experts = config.experts_of(index)
            x = x + (self._mlp(normed, f"{layer}.mlp") if experts is None else self._experts(normed, layer, experts))
        return self._linear(self._norm(x, "model.norm"), "lm_head")

    def _stored(self, name: str, values: Array) -> Array:
        if name.endswith(".mlp.gate.weight"):
            return values.astype(np.float64)
        return quantized(values, values.shape[-1]) if self._format == "int8" else rounded(values, self._format)

    def _mlp(self, x: Array, name: str) -> Array:
        gate, up = (self._linear(x, f"{name}.{part}_proj") for part in ("gate", "up"))
        return self._linear(gate / (1 + np.exp(-gate)) * up, f"{name}.down_proj")

    def _experts(self, x: Array, layer: str, experts: ExpertsConfig) -> Array:
        """All experts compute all tokens; of those that are not chosen, the weight is zero."""
        logits = x @ self._weights[f"{layer}.mlp.gate.weight"].T
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        ranks = (-probabilities).argsort(1, kind="stable").argsort(1)
        weights = np.where(ranks < experts.num_experts_per_token, probabilities, 0)
        if experts.normalizes:
            weights /= weights.sum(1, keepdims=True)
        results = [self._mlp(x, f"{layer}.mlp.experts.{i}") for i in range(experts.num_experts)]
        return sum(weights[:, i, None] * result for i, result in enumerate(results))

    def _attend(self, x: Array, name: str, window: int | None, cos: Array, sin: Array) -> Array:
        heads, kv_heads, dim = self._config.num_heads, self._config.num_kv_heads, self._config.head_dim
        q, k, v = (self._linear(x, f"{name}.{part}_proj") for part in "qkv")
        if not self._config.qk_norm_spans_heads:
            q, k = (part.reshape(len(x), -1, dim) for part in (q, k))
        if self._config.qk_norm:
            q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        limit = self._config.qkv_limit or np.inf
        q, k, v = (part.reshape(len(x), -1, dim).clip(-limit, limit) for part in (q, k, v))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        cached = self._cache_format
        k, v = rounded(k, cached), rounded(v, cached)
        if cached == "bfloat16":
            q = rounded(q, cached)
        distance = np.arange(len(x))[:, None] - np.arange(len(x))
        seen = (distance >= 0) & (distance < (window or len(x)))
        output = np.empty((len(x), heads, dim))
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = np.where(seen, q[:, head] @ k[:, shared].T / np.sqrt(dim), -np.inf)
            probabilities = np.exp(scores - scores.max(1, keepdims=True))
            output[:, head] = probabilities @ v[:, shared] / probabilities.sum(1, keepdims=True)
        return output.reshape(len(x), -1)

    def _linear(self, x: Array, name: str) -> Array:
        if self._format == "int8":
            x = quantized(x, 64)
        elif self._format == "bfloat16":
            x = rounded(x, "bfloat16")
        return x @ self._weights[f"{name}.weight"].T + self._vectors.get(f"{name}.bias", 0.0)

    def _norm(self, x: Array, name: str) -> Array:
        return (
            x / np.sqrt((x * x).mean(-1, keepdims=True) + self._config.rms_norm_eps) * self._vectors[f"{name}.weight"]
        )


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rounded(x: Array, format: str) -> Array:
    """To the nearest number of a format, ties to even."""
    if format == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    return x.astype(format).astype(np.float64)


def quantized(x: Array, group: int) -> Array:
    """To whole numbers from -127 to 127 times a scale, one for each so many neighbours in a row."""
    result = x.astype(np.float64)
    for begin in range(0, x.shape[-1], group):
        part = result[..., begin : begin + group]
        scale = np.abs(part).max(-1, keepdims=True) / 127
        part[...] = np.rint(part / scale) * scale
    return result
