"""A checkpoint's tensors as torch's, on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles
from asyncscale.model.expert_exchange import ExpertShare
from asyncscale.model.weights import Float32, Progress, read_rope_factors, read_weights

_FLOAT32 = ("lm_head.weight", ".mlp.gate.weight")


@dataclass(frozen=True, slots=True)
class Weights:
    """tensors: by Hugging Face's names. rope_factors: float32[head_dim / 2], divisors of RoPE's frequencies (GGUF)."""

    tensors: dict[str, Tensor]
    rope_factors: Float32 | None = None


def load_weights(
    files: CheckpointFiles,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | None = None,
    progress: Progress | None = None,
    share: ExpertShare | None = None,
) -> Weights:
    """The tensors of `files`, in `dtype` on `device`; arguments and errors are read_weights'.

    `lm_head.weight` and the routers are float32: bfloat16 logits are too coarse to rank (from 16 on 0.125 apart).
    """
    tensors: dict[str, Tensor] = {}
    for name, array in read_weights(files, config, progress, share):
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        tensors[name] = tensor.to(device, torch.float32 if name.endswith(_FLOAT32) else dtype)
    return Weights(tensors, read_rope_factors(files, config))
