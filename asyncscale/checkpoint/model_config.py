"""What a checkpoint says about its model's architecture, checked: from config.json or from a GGUF file's metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from asyncscale.checkpoint.experts_config import EXPERT_ARCHITECTURES, ExpertsConfig
from asyncscale.checkpoint.gguf_config import hugging_face_config
from asyncscale.checkpoint.gguf_file import GGUFFile
from asyncscale.checkpoint.rope_config import RopeConfig
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    *EXPERT_ARCHITECTURES,
)
# What transformers takes where config.json does not mention it.
_MISTRAL_SLIDING_WINDOW = 4096
_QWEN3_HEAD_DIM = 128
_MIXTRAL_ROPE_THETA = 1_000_000.0
_RMS_NORM_EPS = {"MixtralForCausalLM": 1e-5, "OlmoeForCausalLM": 1e-5}

_QK_NORMS = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM")
_OPTIONAL_BIASES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM")


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The architecture of a decoder-only model.

    ::

        config = ModelConfig.load(CheckpointFiles(name="m", format="safetensors", path="folder"))

    layer_windows: per layer, how many positions a token sees (its own included), None for all before it.
    intermediate_size: of layers without experts. experts: None where no layer has any.
    qkv_bias, o_bias, mlp_bias: which linear layers have one. qk_norm: RMSNorm of each query and key head (Qwen3);
    qk_norm_spans_heads: of all query heads together, and of all key heads (OLMoE). qkv_limit: magnitude beyond which
    queries, keys and values are cut off, after the norms. dtype: of the checkpoint's tensors, as it states it.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    layer_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    qk_norm_spans_heads: bool
    qkv_limit: float | None
    experts: ExpertsConfig | None
    dtype: str | None

    @classmethod
    def load(cls, files: CheckpointFiles) -> ModelConfig:
        """Raises ModelLoadError that says what was found, and what is supported."""
        if files.format == "gguf":
            file = GGUFFile(files.path)
            return cls.parse(hugging_face_config(file), file.path)
        path = os.path.join(files.path, "config.json")
        return cls.parse(_read_json(path), path)

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> ModelConfig:
        """From the contents of a config.json; `source` is named in errors."""
        architecture = _architecture(config, source)
        _check_supported(config, source)
        _check_present(config, source)
        try:
            model = msgspec.convert(_fields(config, architecture, source), cls)
        except msgspec.ValidationError as error:
            raise ModelLoadError(f"{source}: {error}") from error
        _check_sizes(model, source)
        return model

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """Those of the layer with this index; None where it has a plain MLP."""
        return self.experts if self.experts is not None and self.experts.layers[layer] else None

    @property
    def max_model_len(self) -> int:
        """Longest context in tokens that the checkpoint claims.

        Yarn extends the original length by its factor; `max_position_embeddings` may state either. Dynamic scaling is
        defined relative to `max_position_embeddings`; so is linear scaling only where an original length is stated.
        """
        rope, stated = self.rope, self.max_position_embeddings
        if rope.type == "yarn" or (rope.type == "linear" and rope.original_max_position_embeddings < stated):
            return int(rope.original_max_position_embeddings * rope.factor)
        return int(stated * rope.factor) if rope.type == "dynamic" else stated


def _read_json(path: str) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            config: dict[str, Any] = msgspec.json.decode(file.read(), type=dict[str, Any])
            return config
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ModelLoadError(f"{path} is not a JSON object: {error}") from error


def _architecture(config: Mapping[str, Any], source: str) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if name not in ARCHITECTURES:
        raise ModelLoadError(
            f"{source}: architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return str(name)


def _check_supported(config: Mapping[str, Any], source: str) -> None:
    if config.get("quantization_config"):
        raise ModelLoadError(
            f"{source}: quantized weights (quantization_config) are not supported; "
            "supported are float32, float16 and bfloat16 safetensors, and GGUF files"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelLoadError(f"{source}: hidden_act {config['hidden_act']!r} is not supported; supported is silu")


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def _check_present(config: Mapping[str, Any], source: str) -> None:
    for name in _REQUIRED:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = f"is {value!r}" if name in config else "is missing"
            raise ModelLoadError(f"{source}: {name} {found}; it must be a positive integer")


def _fields(config: Mapping[str, Any], architecture: str, source: str) -> dict[str, Any]:
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim")
    if head_dim is None:
        head_dim = _QWEN3_HEAD_DIM if architecture == "Qwen3ForCausalLM" else config["hidden_size"] // num_heads
    if architecture == "MixtralForCausalLM":
        config = {"rope_theta": _MIXTRAL_ROPE_THETA} | dict(config)
    biased = bool(config.get("attention_bias")) and architecture in _OPTIONAL_BIASES
    return {
        "architecture": architecture,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads") or num_heads,
        "head_dim": head_dim,
        "rms_norm_eps": config.get("rms_norm_eps", _RMS_NORM_EPS.get(architecture, 1e-6)),
        "rope": RopeConfig.parse(config, source),
        "max_position_embeddings": config["max_position_embeddings"],
        "layer_windows": _layer_windows(config, architecture, source),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "qkv_bias": biased or architecture == "Qwen2ForCausalLM",
        "o_bias": biased,
        "mlp_bias": config.get("mlp_bias", False) if architecture == "LlamaForCausalLM" else False,
        "qk_norm": architecture in _QK_NORMS,
        "qk_norm_spans_heads": architecture == "OlmoeForCausalLM",
        "qkv_limit": config.get("clip_qkv") if architecture == "OlmoeForCausalLM" else None,
        "experts": ExpertsConfig.parse(config, architecture, source),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
    }


def _window(config: Mapping[str, Any], architecture: str) -> int | None:
    """The sliding window of those layers that have one."""
    window: int | None = config.get("sliding_window")
    if architecture == "MistralForCausalLM":
        return window if "sliding_window" in config else _MISTRAL_SLIDING_WINDOW
    if architecture == "MixtralForCausalLM" or (architecture.startswith("Qwen") and config.get("use_sliding_window")):
        return window
    return None


def _layer_windows(config: Mapping[str, Any], architecture: str, source: str) -> list[int | None]:
    num_layers = config["num_hidden_layers"]
    window = _window(config, architecture)
    if window is None or architecture not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        return [window] * num_layers
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise ModelLoadError(
            f"{source}: layer_types must hold full_attention or sliding_attention for each of {num_layers} layers, "
            f"got {types!r}"
        )
    return [window if kind == "sliding_attention" else None for kind in types]


def _check_sizes(model: ModelConfig, source: str) -> None:
    if model.num_heads % model.num_kv_heads:
        raise ModelLoadError(
            f"{source}: num_attention_heads ({model.num_heads}) is no multiple of "
            f"num_key_value_heads ({model.num_kv_heads})"
        )
    if model.head_dim < 2 or model.head_dim % 2:
        raise ModelLoadError(f"{source}: head_dim must be even, got {model.head_dim}")
    if model.qkv_limit is not None and not model.qkv_limit > 0:
        raise ModelLoadError(f"{source}: clip_qkv must be positive, got {model.qkv_limit}")
    if any(window is not None and window < 1 for window in model.layer_windows):
        raise ModelLoadError(f"{source}: sliding_window must be at least 1, got {model.layer_windows[0]}")
