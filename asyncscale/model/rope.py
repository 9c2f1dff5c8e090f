"""Rotary position embedding: https://arxiv.org/abs/2104.09864, and the ways to stretch it over longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncscale.checkpoint.rope_config import RopeConfig


class RotaryEmbedding:
    """Angles of tokens by their position, computed once per step for all layers.

    ::

        cos, sin = rotary.cos_sin(positions, lengths)
        rotated = rotate(heads, cos, sin)

    frequency_factors: divide the frequencies (GGUF's `rope_freqs.weight`), float32[head_dim / 2].
    """

    def __init__(
        self, config: RopeConfig, head_dim: int, device: torch.device, frequency_factors: Tensor | None
    ) -> None:
        self._config = config
        self._head_dim = head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self._exponents = exponents
        frequencies = config.theta**-exponents
        match config.type:
            case "linear":
                frequencies = frequencies / config.factor
            case "llama3":
                frequencies = _llama3(frequencies, config)
            case "yarn":
                frequencies = _yarn(frequencies, config)
        if frequency_factors is not None:
            frequencies = frequencies / frequency_factors.to(device)
        self._frequencies = frequencies
        self._magnitude = _yarn_magnitude(config) if config.type == "yarn" else 1.0

    def cos_sin(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """float32[tokens, 1, head_dim] each, for `rotate`; positions, lengths: int64[tokens].

        lengths matter to dynamic scaling only: how long the sequence was when its token was first computed. That is
        the prompt's length for a token of the prompt, position + 1 for a generated one: what transformers' generate()
        comes to with its cache of rotated keys. It depends on nothing else, so neither on chunks nor on preemption.
        """
        frequencies = self._dynamic_frequencies(lengths) if self._config.type == "dynamic" else self._frequencies
        angles = positions.to(torch.float32)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return (cos * self._magnitude)[:, None], (sin * self._magnitude)[:, None]

    def _dynamic_frequencies(self, lengths: Tensor) -> Tensor:
        """[tokens, head_dim / 2]: base raised with the length, as https://github.com/huggingface/transformers/pull/24653."""
        config = self._config
        original = config.original_max_position_embeddings
        stretch = config.factor * lengths.clamp(min=original).to(torch.float32) / original - (config.factor - 1)
        base = config.theta * stretch ** (self._head_dim / (self._head_dim - 2))
        return base[:, None] ** -self._exponents


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads: [tokens, num_heads, head_dim], of which element i is paired with i + head_dim / 2.

    Computed in the angles' float32 and rounded once, to the heads' dtype.
    """
    exact = heads.to(cos.dtype)
    return torch.addcmul(exact * cos, exact.roll(heads.shape[-1] // 2, -1), sin).to(heads.dtype)


def _llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, and blended between (Llama 3.1's model code)."""
    turns = config.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / config.factor)


def _yarn(frequencies: Tensor, config: RopeConfig) -> Tensor:
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
    pairs = torch.arange(half, dtype=torch.float32, device=frequencies.device)
    interpolate = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies * (1 - interpolate + interpolate / config.factor)


def _yarn_magnitude(config: RopeConfig) -> float:
    """What cos and sin are multiplied by, to sharpen attention (section 3.4; mscale is DeepSeek's refinement)."""
    if config.attention_factor is not None:
        return config.attention_factor

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    if config.mscale and config.mscale_all_dim:
        return magnitude(config.mscale) / magnitude(config.mscale_all_dim)
    return magnitude(1.0)
