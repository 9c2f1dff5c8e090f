"""A GGUF file's hyperparameters, as the config.json of the same model would state them.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from typing import Any

from asyncscale.checkpoint.gguf_file import GGUFFile
from asyncscale.errors import ModelLoadError

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
_OPTIONAL_FIELDS = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
}
_ROPE_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "attention_factor": "attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def hugging_face_config(file: GGUFFile) -> dict[str, Any]:
    """`file`'s metadata under config.json's names. Raises ModelLoadError, naming the key that is missing."""
    arch = file.metadata.get("general.architecture")
    if arch not in _ARCHITECTURES or _get(file, f"{arch}.expert_count"):
        experts = " with experts" if arch in _ARCHITECTURES else ""
        supported = ", ".join(_ARCHITECTURES)
        raise ModelLoadError(
            f"{file.path}: GGUF architecture {arch!r}{experts} is not supported; supported are {supported}"
        )
    if "token_embd.weight" not in file.tensors:
        raise ModelLoadError(f"{file.path}: it has no tensor 'token_embd.weight'")
    config = {name: _required(file, f"{arch}.{key}") for name, key in _FIELDS.items()}
    for name, key in _OPTIONAL_FIELDS.items():
        if (value := _get(file, f"{arch}.{key}")) is not None:
            config[name] = value
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config |= {
        "architectures": [_ARCHITECTURES[arch]],
        "hidden_act": "silu",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_scaling": _rope_scaling(file, arch),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }
    _check_rotary_dimensions(file, arch, config["head_dim"])
    _set_sliding_window(file, arch, config)
    return config


def _get(file: GGUFFile, key: str) -> Any:
    value = file.metadata.get(key)
    if isinstance(value, list):
        raise ModelLoadError(f"{file.path}: {key} differs from layer to layer, which is not supported")
    return value


def _required(file: GGUFFile, key: str) -> Any:
    value = _get(file, key)
    if value is None:
        raise ModelLoadError(f"{file.path}: its metadata has no {key!r}")
    return value


def _rope_scaling(file: GGUFFile, arch: str) -> dict[str, Any] | None:
    kind = _get(file, f"{arch}.rope.scaling.type")
    if kind in (None, "none"):
        return None
    scaling = {name: _get(file, f"{arch}.rope.scaling.{key}") for name, key in _ROPE_FIELDS.items()}
    if kind == "yarn" and scaling["attention_factor"] is not None:
        raise ModelLoadError(f"{file.path}: {arch}.rope.scaling.attn_factor is not supported")
    return {"rope_type": kind} | scaling


def _check_rotary_dimensions(file: GGUFFile, arch: str, head_dim: int) -> None:
    rotary = _get(file, f"{arch}.rope.dimension_count")
    if rotary not in (None, head_dim):
        raise ModelLoadError(f"{file.path}: RoPE over {rotary} of {head_dim} head dimensions is not supported")


def _set_sliding_window(file: GGUFFile, arch: str, config: dict[str, Any]) -> None:
    window = _get(file, f"{arch}.attention.sliding_window")
    if not window:
        return
    config["sliding_window"] = window
    if arch == "llama":  # Mistral's files say that they are llama
        config["architectures"] = ["MistralForCausalLM"]
    else:
        config |= {"use_sliding_window": True, "max_window_layers": 0}
