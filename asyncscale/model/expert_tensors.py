"""The tensors of a mixture-of-experts checkpoint under one name each, whatever its maker called them.

The names are `mlp.gate.weight`, the router's, and `mlp.experts.{i}.gate_proj.weight`, `.up_proj.weight` and
`.down_proj.weight`. Mixtral's checkpoints have others; those that transformers 5 writes as it holds them
(`save_original_format=False`) have all experts of a layer in one tensor, `gate_up_proj` or `down_proj`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MIXTRAL_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_MIXTRAL = re.compile(r"(.*\.)block_sparse_moe\.(gate|experts\.\d+\.w[123])\.weight")
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_OF_EXPERT = re.compile(r".*\.mlp\.experts\.(\d+)\..*")
_FUSED_NAME = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def common_name(name: str) -> str:
    """`model.layers.0.block_sparse_moe.experts.7.w1.weight` -> `model.layers.0.mlp.experts.7.gate_proj.weight`."""
    match = _MIXTRAL.fullmatch(name)
    if match is None:
        return name
    module, part = match[1], match[2]
    return (
        f"{module}mlp.{part[:-2]}{_MIXTRAL_PARTS[part[-2:]]}.weight" if part != "gate" else f"{module}mlp.gate.weight"
    )


def expert_of(name: str) -> int | None:
    """Which expert has the tensor of this common name; None for those that all tokens share, routers included."""
    match = _OF_EXPERT.fullmatch(name)
    return int(match[1]) if match is not None else None


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One expert's matrix in a tensor of all experts; it begins `first_element` elements after that."""

    name: str
    shape: tuple[int, int]
    first_element: int


def expert_tensors(name: str, shape: tuple[int, ...]) -> list[ExpertTensor]:
    """What a tensor of all experts consists of; nothing where it is none.

    ::

        for tensor in expert_tensors("model.layers.0.mlp.experts.gate_up_proj", (num_experts, 2 * inner, hidden)):
            ...  # model.layers.0.mlp.experts.0.gate_proj.weight, [inner, hidden]; then up_proj; then expert 1
    """
    match = _FUSED_NAME.fullmatch(name)
    if match is None or len(shape) != 3:
        return []
    experts, parts = match[1], _FUSED[match[2]]
    rows, columns = shape[1] // len(parts), shape[2]
    names = [f"{experts}.{expert}.{part}.weight" for expert in range(shape[0]) for part in parts]
    return [ExpertTensor(name, (rows, columns), i * rows * columns) for i, name in enumerate(names)]
