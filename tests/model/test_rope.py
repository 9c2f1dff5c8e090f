"""RoPE's frequencies against transformers' functions, with the parameters of published models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from asyncscale.checkpoint.rope_config import RopeConfig
from asyncscale.model.rope import RotaryEmbedding
from asyncscale.model.torch_decoder import rotate

HEAD_DIM = 128
HALF = HEAD_DIM // 2
CPU = torch.device("cpu")
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-3.1": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama-3.2": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "qwen2.5-yarn": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768,
    },
    "deepseek-yarn": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.5,
    },
    "yarn-own-factor": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 4096,
        "attention_factor": 1.25, "truncate": False,
    },
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "default": {"rope_type": "default", "rope_theta": 1e5},
}  # fmt: skip


def _config(parameters: dict[str, Any], max_position_embeddings: int = 32768) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=dict(parameters),
    )


def _ours(parameters: dict[str, Any], max_position_embeddings: int = 32768) -> RotaryEmbedding:
    config = {"max_position_embeddings": max_position_embeddings, "rope_parameters": parameters}
    return RotaryEmbedding(RopeConfig.parse(config, "test"), HEAD_DIM, None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_angles_are_those_of_transformers(name: str) -> None:
    positions = np.array([0, 1, 7, 100, 4095, 8192, 30000])
    theirs = LlamaRotaryEmbedding(_config(PUBLISHED[name]))
    cos, sin = (part[0, :, :HALF] for part in theirs(torch.zeros(1), torch.from_numpy(positions)[None]))
    our_cos, our_sin = _ours(PUBLISHED[name]).cos_sin(positions, positions + 1)
    assert our_cos.dtype == our_sin.dtype == np.float32
    # float32 angles of 30,000 differ in the last bit by 2e-3
    np.testing.assert_allclose(our_cos, cos, atol=4e-3)
    np.testing.assert_allclose(our_sin, sin, atol=4e-3)
    np.testing.assert_allclose(our_cos[:4], cos[:4], atol=2e-5)
    np.testing.assert_allclose(our_sin[:4], sin[:4], atol=2e-5)


@pytest.mark.parametrize("name", ["default", "deepseek-yarn"])
def test_angles_do_not_depend_on_the_positions_before(name: str) -> None:
    together, rotary = _ours(PUBLISHED[name]), _ours(PUBLISHED[name])
    positions = np.array([5, 1023, 1024, 30000, 5000, 2])
    cos, sin = together.cos_sin(positions, positions + 1)
    for i, position in enumerate(positions):
        alone = rotary.cos_sin(np.array([position]), np.array([position + 1]))
        assert np.array_equal(cos[i], alone[0][0])
        assert np.array_equal(sin[i], alone[1][0])


def test_rotation_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(5, 3, HEAD_DIM, generator=generator)
    positions = torch.tensor([0, 3, 9, 10, 200])
    cos, sin = LlamaRotaryEmbedding(_config(PUBLISHED["default"]))(heads, positions[None])
    theirs, _ = apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin)
    ours = rotate(heads, *_angles(positions.numpy()))
    np.testing.assert_allclose(ours, theirs[0].transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize("length", [1, 2048, 2049, 5000, 8192])
def test_dynamic_frequencies_follow_each_tokens_length(length: int) -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](_config(parameters, 2048), CPU, seq_len=length)
    # Another token of the batch belongs to a longer sequence.
    cos, _ = _ours(parameters, 2048).cos_sin(np.array([3, 3]), np.array([length, 9000]))
    np.testing.assert_allclose(cos[0], (3 * frequencies).cos(), atol=1e-6)
    assert not np.array_equal(cos[0], cos[1])


def test_frequency_factors_divide_the_frequencies() -> None:
    config = RopeConfig.parse({"max_position_embeddings": 64, "rope_theta": 1e4}, "test")
    factors = np.linspace(1, 8, HALF, dtype=np.float32)
    position = np.array([1])
    cos, _ = RotaryEmbedding(config, HEAD_DIM, factors).cos_sin(position, position)
    expected = np.cos(1e4 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM) / factors)
    np.testing.assert_allclose(cos[0], expected, atol=1e-6)


def test_bfloat16_heads_are_rotated_in_float32_and_rounded_once() -> None:
    cos, sin = _angles(np.arange(200))
    heads = torch.randn(200, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rotate(heads, cos, sin), rotate(heads.float(), cos, sin).bfloat16())


def _angles(positions: np.ndarray) -> list[torch.Tensor]:
    """What torch's `rotate` takes."""
    return [torch.from_numpy(part)[:, None] for part in _ours(PUBLISHED["default"]).cos_sin(positions, positions + 1)]
