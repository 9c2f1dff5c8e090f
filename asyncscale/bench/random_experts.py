"""A mixture-of-experts checkpoint of random weights, as large as is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.model.weights import weight_shapes

_HEAD_DIM = 64
_SPREAD = 0.03  # of the weights; what a random model says means nothing, at any


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """Of the architecture of Qwen3-MoE. inner: the intermediate size of each expert. per_token: experts of a token."""

    hidden: int = 512
    num_layers: int = 8
    num_experts: int = 16
    per_token: int = 2
    inner: int = 1024
    vocabulary: int = 8192

    @property
    def num_expert_weights(self) -> int:
        """Of all experts of all layers."""
        return self.num_layers * self.num_experts * 3 * self.hidden * self.inner


def write_checkpoint(folder: Path, sizes: ExpertSizes, seed: int = 0) -> None:
    """Make the folder, with config.json, weights in float16 and a tokenizer that has a word for each token id."""
    folder.mkdir()
    config = _config(sizes)
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{token_id}": token_id for token_id in range(sizes.vocabulary)}
    tokenizer = {"model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rng = np.random.default_rng(seed)
    shapes = weight_shapes(ModelConfig.parse(config, str(folder)))
    save_file({name: _draw(rng, shape) for name, shape in shapes.items()}, folder / "model.safetensors")


def _config(sizes: ExpertSizes) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.hidden // _HEAD_DIM,
        "num_key_value_heads": max(1, sizes.hidden // _HEAD_DIM // 2),
        "head_dim": _HEAD_DIM,
        "num_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.per_token,
        "moe_intermediate_size": sizes.inner,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    }


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float16]]:
    if len(shape) == 1:
        return np.ones(shape, np.float16)  # norms
    return (np.float32(_SPREAD) * rng.standard_normal(shape, np.float32)).astype(np.float16)
