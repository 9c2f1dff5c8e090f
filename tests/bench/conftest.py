"""A tiny checkpoint of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles
from asyncscale.kernels.library import load_library
from asyncscale.model.weights import weight_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def tiny_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointFiles:
    """Without a tokenizer."""
    if load_library() is None:
        pytest.skip("the kernels were not built")
    monkeypatch.setenv("ASYNCSCALE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    files = CheckpointFiles(name="tiny", format="safetensors", path=str(folder))
    rng = np.random.default_rng(0)
    shapes = weight_shapes(ModelConfig.load(files))
    save_file(
        {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return files
