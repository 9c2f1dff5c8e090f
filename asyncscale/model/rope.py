"""Rotary position embedding: https://arxiv.org/abs/2104.09864, and the ways to stretch it over longer contexts."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from asyncscale.checkpoint.rope_config import RopeConfig

Float32 = npt.NDArray[np.float32]
Integers = npt.NDArray[np.integer]

_FEWEST_POSITIONS = 1024  # in the table; it doubles when a position beyond it comes


class RotaryEmbedding:
    """Angles of tokens by their position, looked up once per step for all layers.

    ::

        cos, sin = rotary.cos_sin(positions, lengths)
        # of each head, element i is paired with element i + head_dim / 2:
        rotated = first * cos - second * sin, second * cos + first * sin

    depends_on_lengths: whether cos_sin looks at them.
    frequency_factors: divide the frequencies (GGUF's `rope_freqs.weight`), float32[head_dim / 2].
    """

    def __init__(self, config: RopeConfig, head_dim: int, frequency_factors: Float32 | None) -> None:
        self.depends_on_lengths = config.type == "dynamic"
        self._config = config
        self._head_dim = head_dim
        self._exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
        frequencies = (config.theta**-self._exponents).astype(np.float32)
        match config.type:
            case "linear":
                frequencies = frequencies / config.factor
            case "llama3":
                frequencies = _llama3(frequencies, config)
            case "yarn":
                frequencies = _yarn(frequencies, config)
        if frequency_factors is not None:
            frequencies = frequencies / frequency_factors
        self._frequencies: Float32 = frequencies
        self._magnitude = np.float32(_yarn_magnitude(config) if config.type == "yarn" else 1.0)
        self._cos = self._sin = np.empty((0, head_dim // 2), np.float32)  # of positions from 0 on

    def cos_sin(self, positions: Integers, lengths: Integers) -> tuple[Float32, Float32]:
        """float32[tokens, head_dim / 2] each, contiguous, multiplied by the scaling's magnitude.

        positions, lengths: integers[tokens].

        lengths matter to dynamic scaling only: how long the sequence was when its token was first computed. That is
        the prompt's length for a token of the prompt, position + 1 for a generated one: what transformers' generate()
        comes to with its cache of rotated keys. It depends on nothing else, so neither on chunks nor on preemption.
        """
        if self.depends_on_lengths:
            return self._compute(positions, self._dynamic_frequencies(lengths))
        highest = int(positions.max(initial=0))
        if highest >= len(self._cos):
            self._grow(highest)
        return self._cos[positions], self._sin[positions]

    def _grow(self, highest: int) -> None:
        positions = np.arange(len(self._cos), max(_FEWEST_POSITIONS, 1 << highest.bit_length()))
        cos, sin = self._compute(positions, self._frequencies)
        self._cos, self._sin = np.concatenate((self._cos, cos)), np.concatenate((self._sin, sin))

    def _compute(self, positions: Integers, frequencies: Float32) -> tuple[Float32, Float32]:
        angles = positions.astype(np.float32)[:, None] * frequencies
        # By way of float64, because numpy's float32 functions differ in their last bits from one CPU to another.
        exact = angles.astype(np.float64)
        cos, sin = np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)
        return cos * self._magnitude, sin * self._magnitude

    def _dynamic_frequencies(self, lengths: Integers) -> Float32:
        """[tokens, head_dim / 2]: base raised with the length, as https://github.com/huggingface/transformers/pull/24653."""
        config = self._config
        original = config.original_max_position_embeddings
        longer = np.maximum(lengths, original).astype(np.float32)
        stretch = config.factor * longer / original - (config.factor - 1)
        base = config.theta * stretch ** (self._head_dim / (self._head_dim - 2))
        return (base[:, None] ** -self._exponents).astype(np.float32)


def _llama3(frequencies: Float32, config: RopeConfig) -> Float32:
    """Long wavelengths are divided by the factor, short ones kept, and blended between (Llama 3.1's model code)."""
    turns = frequencies * (config.original_max_position_embeddings / (2 * math.pi))  # in the original context
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = ((turns - low) / (high - low)).clip(0, 1)
    return (frequencies * (keep + (1 - keep) / config.factor)).astype(np.float32)


def _yarn(frequencies: Float32, config: RopeConfig) -> Float32:
    """As _llama3, but blended over the dimensions' indices: https://arxiv.org/abs/2309.00071, section 3.2."""
    half = len(frequencies)

    def dimension(turns: float) -> float:
        """Which pair turns so many times within the original context."""
        wavelengths = config.original_max_position_embeddings / (turns * 2 * math.pi)
        return half * math.log(wavelengths) / math.log(config.theta)

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    pairs = np.arange(half, dtype=np.float32)
    interpolate = ((pairs - low) / max(high - low, 1e-3)).clip(0, 1)
    return (frequencies * (1 - interpolate + interpolate / config.factor)).astype(np.float32)


def _yarn_magnitude(config: RopeConfig) -> float:
    """What cos and sin are multiplied by, to sharpen attention (section 3.4; mscale is DeepSeek's refinement)."""
    if config.attention_factor is not None:
        return config.attention_factor

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    if config.mscale and config.mscale_all_dim:
        return magnitude(config.mscale) / magnitude(config.mscale_all_dim)
    return magnitude(1.0)
