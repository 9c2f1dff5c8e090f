"""A GGUF file's tensors under Hugging Face's names, dequantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from asyncscale.checkpoint.gguf_file import GGUFFile
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.errors import ModelLoadError

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
    file: GGUFFile, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `shapes`, float32. Raises ModelLoadError, naming the tensor as the file does."""
    names = {name: gguf_name(name) for name in shapes}
    unknown = file.tensors.keys() - names.values() - {_ROPE_FACTORS}
    if unknown:
        raise ModelLoadError(f"{file.path}: tensor {min(unknown)!r} is not part of a {config.architecture}")
    for name, stored in names.items():
        if stored not in file.tensors:
            raise ModelLoadError(f"{file.path}: tensor {stored!r} is missing")
        if file.tensors[stored].shape != shapes[name]:
            raise ModelLoadError(
                f"{file.path}: tensor {stored!r} has the shape {file.tensors[stored].shape}, expected {shapes[name]}"
            )
        tensor = torch.from_numpy(file.tensors[stored].dequantize())
        yield name, _rotation_halves(tensor, config) if _is_permuted(name, config) else tensor


def read_rope_factors(file: GGUFFile, config: ModelConfig) -> Tensor | None:
    """What RoPE's frequencies are divided by, float32[head_dim / 2], if the file says so (Llama 3.1's scaling)."""
    stored = file.tensors.get(_ROPE_FACTORS)
    if stored is None:
        return None
    if stored.shape != (config.head_dim // 2,):
        raise ModelLoadError(
            f"{file.path}: tensor {_ROPE_FACTORS!r} has the shape {stored.shape}, expected {(config.head_dim // 2,)}"
        )
    return torch.from_numpy(stored.dequantize())


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


def _rotation_halves(tensor: Tensor, config: ModelConfig) -> Tensor:
    """Rows 0, 2, 4 ... of each head, then 1, 3, 5 ...: element i is paired with i + head_dim / 2 instead of i + 1."""
    pairs = tensor.view(-1, config.head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
