from __future__ import annotations

import msgspec
import pytest

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.client.sizing import auto_num_engines
from asyncscale.config import EngineConfig

GIB = 2**30
# Llama 3.1 8B: 16 GB of weights in bfloat16, 128 KiB of keys and values for each token.
LARGE = ModelConfig.parse(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },
    "config.json",
)
SMALL = msgspec.structs.replace(
    LARGE, num_layers=2, hidden_size=256, intermediate_size=512, max_position_embeddings=512
)


@pytest.mark.parametrize(
    ("num_cores", "config", "model", "available", "num_engines"),
    [
        (1, {}, SMALL, 8 * GIB, 1),
        (2, {}, SMALL, 8 * GIB, 2),
        (64, {}, SMALL, 8 * GIB, 4),
        (64, {}, None, 0, 4),
        (4, {}, LARGE, 64 * GIB, 1),  # 15 GiB of weights; a context takes 16 GiB, and there are 20
        (4, {"kv_cache_memory_fraction": 0.9}, LARGE, 64 * GIB, 2),
        (4, {}, LARGE, 256 * GIB, 4),
        (4, {"max_model_len": 8192}, LARGE, 24 * GIB, 3),  # 1 GiB each of 3.6
        (4, {"max_model_len": 8192}, LARGE, 8 * GIB, 1),  # not even the weights: whoever loads them says so
        (4, {"max_model_len": 8192, "dtype": "float32"}, LARGE, 48 * GIB, 3),
        (4, {"kv_cache_memory_bytes": GIB}, LARGE, 24 * GIB, 4),
        (4, {"num_kv_blocks": 100}, LARGE, 24 * GIB, 4),
    ],
)
def test_as_many_engines_as_cores_and_memory_allow(
    num_cores: int, config: dict[str, int], model: ModelConfig | None, available: int, num_engines: int
) -> None:
    assert auto_num_engines(num_cores, EngineConfig(**config), model, available) == num_engines
