"""What is read from config.json and GGUF metadata, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def _parse(**changes: object) -> ModelConfig:
    return ModelConfig.parse(BASE | changes, "config.json")


def test_a_folder_s_config_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"torch_dtype": "bfloat16", "tie_word_embeddings": True}))
    config = ModelConfig.load(CheckpointFiles(name="m", format="safetensors", path=str(tmp_path)))
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (1000, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 8, 2, 8)
    assert (config.rms_norm_eps, config.dtype, config.tie_word_embeddings) == (1e-5, "bfloat16", True)
    assert config.layer_windows == (None,) * 4
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False,) * 4


def test_attention_is_multi_head_where_no_number_of_key_heads_is_given() -> None:
    without = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
    assert ModelConfig.parse(without, "config.json").num_kv_heads == 8


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        ("Qwen2ForCausalLM", {}, (True, False, False, False)),
        ("Qwen3ForCausalLM", {}, (False, False, False, True)),
        ("Qwen3ForCausalLM", {"attention_bias": True}, (True, True, False, True)),
        ("MistralForCausalLM", {"sliding_window": None}, (False, False, False, False)),
    ],
)
def test_biases_and_norms_follow_the_architecture(
    architecture: str, changes: dict[str, Any], expected: tuple[bool, ...]
) -> None:
    config = _parse(architectures=[architecture], **changes)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == expected


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("LlamaForCausalLM", {"sliding_window": 7}, (None,) * 4),
        ("MistralForCausalLM", {"sliding_window": 7}, (7,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (None,) * 4),
        ("MistralForCausalLM", {}, (4096,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "max_window_layers": 1}, (None,) * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 7, "max_window_layers": 1, "use_sliding_window": True},
            (None, 7, 7, 7),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
            },
            (None, 7, None, 7),
        ),
    ],
)
def test_sliding_windows_follow_the_architecture(
    architecture: str, changes: dict[str, Any], expected: tuple[int | None, ...]
) -> None:
    assert _parse(architectures=[architecture], **changes).layer_windows == expected


def test_heads_have_the_size_that_transformers_takes() -> None:
    assert _parse(head_dim=32).head_dim == 32
    assert _parse(head_dim=None).head_dim == 8
    assert _parse(architectures=["Qwen3ForCausalLM"]).head_dim == 128


def test_rope_is_read_from_the_old_and_the_new_style() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    old = _parse(rope_theta=5e5, rope_scaling={"type": "llama3"} | scaling).rope
    assert old == _parse(rope_theta=5e5, rope_scaling={"rope_type": "llama3"} | scaling).rope
    assert old == _parse(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | scaling).rope
    assert (old.type, old.theta, old.factor, old.original_max_position_embeddings) == ("llama3", 5e5, 8.0, 512)
    assert (_parse().rope.type, _parse().rope.theta) == ("default", 10_000.0)


def test_dynamic_scaling_sets_in_beyond_max_position_embeddings_whatever_else_is_stated() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}
    assert _parse(rope_scaling=scaling).rope.original_max_position_embeddings == 2048


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        ({"rope_type": "linear", "factor": 2.0}, 2048),
        ({"rope_type": "linear", "factor": 8.0, "original_max_position_embeddings": 1024}, 8192),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            2048,
        ),
    ],
)
def test_the_context_takes_rope_scaling_into_account(scaling: dict[str, Any] | None, expected: int) -> None:
    assert _parse(rope_scaling=scaling).max_model_len == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Phi3ForCausalLM"]}, "'Phi3ForCausalLM' is not supported; supported are LlamaFor"),
        ({"architectures": None}, "architecture None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported is silu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized weights .* are not supported; supported are"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE type 'longrope' is not supported; supported are default,"),
        ({"rope_scaling": {"rope_type": "linear"}}, "RoPE type 'linear' needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "big"}}, "bad RoPE parameters"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "must be positive"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "of this form are not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size is None; it must be a positive integer"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) is no multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window must be at least 1"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["full_attention"],
            },
            "layer_types must hold",
        ),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=f"config.json: .*{message}"):
        _parse(**changes)


def test_a_missing_field_is_named() -> None:
    without = {name: value for name, value in BASE.items() if name != "vocab_size"}
    with pytest.raises(ModelLoadError, match=r"config\.json: vocab_size is missing"):
        ModelConfig.parse(without, "config.json")


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_config_json_that_is_no_json_object_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, "latin-1")
    with pytest.raises(ModelLoadError, match=r"config\.json is not a JSON object"):
        ModelConfig.load(CheckpointFiles(name="m", format="safetensors", path=str(tmp_path)))


def test_a_folder_without_config_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"cannot read .*config\.json: No such file"):
        ModelConfig.load(CheckpointFiles(name="m", format="safetensors", path=str(tmp_path)))


GGUF_BASE: dict[str, Any] = {
    "embedding_length": 64,
    "feed_forward_length": 96,
    "block_count": 2,
    "attention.head_count": 8,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "context_length": 2048,
    "rope.freq_base": 5e5,
}


def _gguf(path: Path, arch: str = "llama", **changes: object) -> CheckpointFiles:
    """A file with only an embedding; a change to None removes a key."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (GGUF_BASE | {key.replace("__", "."): value for key, value in changes.items()}).items():
        match value:
            case int():
                writer.add_uint32(f"{arch}.{key}", value)
            case float():
                writer.add_float32(f"{arch}.{key}", value)
            case str():
                writer.add_string(f"{arch}.{key}", value)
            case list():
                writer.add_array(f"{arch}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((300, 64), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return CheckpointFiles(name="m", format="gguf", path=str(path))


def test_gguf_metadata_is_read(tmp_path: Path) -> None:
    config = ModelConfig.load(_gguf(tmp_path / "m.gguf"))
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("LlamaForCausalLM", 300, 64)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 8, 2, 8)
    assert (config.rope.theta, config.max_model_len, config.tie_word_embeddings) == (5e5, 2048, True)


def test_gguf_scaling_and_window_are_read(tmp_path: Path) -> None:
    scaling: dict[str, Any] = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 1024,
    }
    config = ModelConfig.load(_gguf(tmp_path / "m.gguf", attention__sliding_window=16, **scaling))
    assert (config.rope.type, config.rope.factor, config.max_model_len) == ("yarn", 4.0, 4096)
    assert (config.architecture, config.layer_windows) == ("MistralForCausalLM", (16, 16))


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("gemma", {}, "GGUF architecture 'gemma' is not supported; supported are llama, qwen2, qwen3"),
        ("llama", {"expert_count": 8}, "'llama' with experts is not supported"),
        ("qwen3moe", {"expert_count": 8}, "GGUF architecture 'qwen3moe' is not supported"),
        ("llama", {"context_length": None}, "its metadata has no 'llama.context_length'"),
        ("llama", {"attention__head_count_kv": [2, 1]}, "differs from layer to layer"),
        ("llama", {"rope__dimension_count": 4}, "RoPE over 4 of 8 head dimensions is not supported"),
        ("llama", {"rope__scaling__type": "longrope"}, "RoPE type 'longrope' is not supported"),
    ],
)
def test_gguf_files_that_are_not_supported_say_why(
    arch: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=rf"m\.gguf: .*{message}"):
        ModelConfig.load(_gguf(tmp_path / "m.gguf", arch, **changes))
