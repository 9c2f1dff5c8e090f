"""A checkpoint's tensors under Hugging Face's names, checked against the architecture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asyncscale.checkpoint.gguf_file import GGUFFile
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError
from asyncscale.model.gguf_weights import read_gguf, read_rope_factors

Shapes = dict[str, tuple[int, ...]]
Progress = Callable[[float], None]

_HEAD = "lm_head.weight"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Tensors that some checkpoints hold besides the weights, and that are derived from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias")


@dataclass(frozen=True, slots=True)
class Weights:
    """tensors: by Hugging Face's names. rope_factors: float32[head_dim / 2], divisors of RoPE's frequencies (GGUF)."""

    tensors: dict[str, Tensor]
    rope_factors: Tensor | None = None


def load_weights(
    files: CheckpointFiles,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Weights:
    """All tensors of `files`, in `dtype` on `device`; `progress` is called with the fraction that is read.

    `lm_head.weight` is always among them, and float32: bfloat16 logits are too coarse to rank (from 16 on 0.125 apart).
    Raises ModelLoadError, naming file and tensor, where one is missing, of another shape, or not of this architecture,
    and where a file cannot be read.
    """
    shapes = weight_shapes(config)
    factors = None
    if files.format == "gguf":
        file = GGUFFile(files.path)
        source = read_gguf(file, config, shapes)
        factors = read_rope_factors(file, config)
    else:
        source = _read_safetensors(files.path, config, shapes)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else _HEAD
    tensors: dict[str, Tensor] = {}
    for count, (name, tensor) in enumerate(source, 1):
        if name == head:
            tensors[_HEAD] = tensor.to(device, torch.float32)
        if name != _HEAD:
            tensors[name] = tensor.to(device, dtype)
        if progress is not None:
            progress(count / len(shapes))
    return Weights(tensors, factors)


def weight_shapes(config: ModelConfig) -> Shapes:
    """Name and shape of every tensor that a model of this configuration has."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (config.vocab_size, config.hidden_size)
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in _layer_shapes(config).items()}
    return shapes


def _layer_shapes(config: ModelConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, config.qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: Shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    for name, (rows, columns, bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    return shapes


def _read_safetensors(folder: str, config: ModelConfig, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    missing = set(shapes)
    for path in _safetensors_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    if name in shapes:
                        missing.discard(name)
                        yield name, _checked(file.get_tensor(name), name, shapes[name], path)
                    elif not _is_ignorable(name, config):
                        raise ModelLoadError(f"{path}: tensor {name!r} is not part of a {config.architecture}")
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"cannot read {path} as a safetensors file (truncated?): {error}") from error
    if missing:
        raise ModelLoadError(f"{folder}: {len(missing)} tensors are missing, among them {min(missing)!r}")


def _safetensors_files(folder: str) -> list[str]:
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        try:
            with open(index, "rb") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(f"cannot read {index} as an index of safetensors files: {error!r}") from error
    else:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if not names:
        raise ModelLoadError(f"{folder} holds no *.safetensors file")
    paths = [os.path.join(folder, name) for name in names]
    for path in paths:
        if not os.path.exists(path):
            raise ModelLoadError(f"{path}, which {index} lists, is missing")
    return paths


def _checked(tensor: Tensor, name: str, shape: tuple[int, ...], path: str) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ModelLoadError(f"{path}: tensor {name!r} has the shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in _DTYPES:
        raise ModelLoadError(
            f"{path}: tensor {name!r} is {tensor.dtype}; supported are {', '.join(str(dtype) for dtype in _DTYPES)}"
        )
    return tensor


def _is_ignorable(name: str, config: ModelConfig) -> bool:
    tied_copy = config.tie_word_embeddings and name == _HEAD
    return tied_copy or name.endswith(_DERIVED)
