"""A GGUF file's tensors under Hugging Face's names, dequantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from asyncscale.checkpoint.gguf_file import GGUFFile
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.errors import ModelLoadError

Float32 = npt.NDArray[np.float32]

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"


def read_gguf(
    path: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Callable[[], Float32]]:
    """Of every tensor of `shapes` a function that reads it.

    Raises ModelLoadError, naming the tensor as the file does.
    """
    file = GGUFFile(path)
    names = {name: gguf_name(name) for name in shapes}
    unknown = file.tensors.keys() - names.values() - {_ROPE_FACTORS}
    if unknown:
        raise ModelLoadError(f"{file.path}: tensor {min(unknown)!r} is not part of a {config.architecture}")
    for name, stored in names.items():
        if stored not in file.tensors:
            raise ModelLoadError(f"{file.path}: tensor {stored!r} is missing")
        _check_shape(file, stored, shapes[name])
    return {name: partial(_read, file, stored, name, config) for name, stored in names.items()}


def _read(file: GGUFFile, stored: str, name: str, config: ModelConfig) -> Float32:
    tensor = file.tensors[stored].dequantize()
    return _rotation_halves(tensor, config) if _is_permuted(name, config) else tensor


def read_gguf_rope_factors(file: GGUFFile, config: ModelConfig) -> Float32 | None:
    """What RoPE's frequencies are divided by, float32[head_dim / 2], if the file says so (Llama 3.1's scaling)."""
    if _ROPE_FACTORS not in file.tensors:
        return None
    _check_shape(file, _ROPE_FACTORS, (config.head_dim // 2,))
    return file.tensors[_ROPE_FACTORS].dequantize()


def _check_shape(file: GGUFFile, name: str, shape: tuple[int, ...]) -> None:
    found = file.tensors[name].shape
    if found != shape:
        raise ModelLoadError(f"{file.path}: tensor {name!r} has the shape {found}, expected {shape}")


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor: `model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    module, kind = name.rsplit(".", 1)
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    _, _, index, part = module.split(".", 3)
    return f"blk.{index}.{_LAYER[part]}.{kind}"


def _is_permuted(name: str, config: ModelConfig) -> bool:
    # Files of llama's architecture (Mistral's too) pair neighbouring elements of a head for RoPE, the others halves.
    return config.architecture in ("LlamaForCausalLM", "MistralForCausalLM") and any(
        f".{part}." in name for part in ("q_proj", "k_proj")
    )


def _rotation_halves(tensor: Float32, config: ModelConfig) -> Float32:
    """Rows 0, 2, 4 ... of each head, then 1, 3, 5 ...: element i is paired with i + head_dim / 2 instead of i + 1."""
    pairs = tensor.reshape(-1, config.head_dim // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)
