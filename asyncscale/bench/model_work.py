"""How much a step of the native decoder has to multiply and to read, part by part."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.kernels.library import Format
from asyncscale.kernels.limits import Limits
from asyncscale.model.packing import head_format, packed_specs

# Phases with products of weights, and these weights' names in packing.py.
_LINEARS = {
    "qkv": "qkv",
    "output": "o",
    "gate_up": "gate_up",
    "down": "down",
    "router": "router",
    "experts_gate_up": "experts.gate_up",
    "experts_down": "experts.down",
    "head": "head",
}

_LAYER = re.compile(r"layers\.\d+\.")


@dataclass(frozen=True, slots=True)
class Work:
    """operations: multiplications and additions, of numbers of `format`. num_bytes: of weights, or keys and values,
    each read once."""

    operations: float
    num_bytes: float
    format: Format

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.num_bytes + other.num_bytes, self.format)

    def least_seconds(self, limits: Limits) -> float:
        """What the slower one of arithmetic and memory takes."""
        return max(self.arithmetic_seconds(limits), self.num_bytes / limits.bytes_per_s)

    def arithmetic_seconds(self, limits: Limits) -> float:
        return self.operations / limits.operations_per_s[self.format]


class StepWork:
    """What steps of a model have to do.

    ::

        step_work = StepWork(model, "int8", "bfloat16")
        works = step_work.of(starts, counts, num_logits)  # by the names of library.PHASES, less those without products

    Of experts, so many are read as would be if each token chose its own by lot.
    """

    def __init__(self, model: ModelConfig, weight_format: Format, cache_format: Format) -> None:
        self._model = model
        self._formats = dict.fromkeys(_LINEARS, weight_format)
        self._formats |= {"head": head_format(weight_format), "router": "float32"}
        self._cache_format = cache_format
        self._num_bytes = _bytes_by_phase(model, weight_format)
        self._num_products = _products_by_phase(model)

    @property
    def weight_bytes(self) -> int:
        """What has to be read for every step, whatever is in it."""
        return int(sum(num_bytes * self._share_read(phase, 1) for phase, num_bytes in self._num_bytes.items()))

    def of(self, starts: npt.NDArray[np.integer], counts: npt.NDArray[np.integer], num_logits: int) -> dict[str, Work]:
        """starts, counts: of each sequence, the position of its first new token and how many there are."""
        works = {"attention": self._attention(starts.astype(np.int64), counts.astype(np.int64))}
        for phase, num_products in self._num_products.items():
            num_tokens = num_logits if phase == "head" else int(counts.sum())
            num_bytes = self._num_bytes[phase] * self._share_read(phase, num_tokens)
            works[phase] = Work(2 * num_products * num_tokens, num_bytes, self._formats[phase])
        return works

    def _share_read(self, phase: str, num_tokens: int) -> float:
        """Of a phase's weights, by so many tokens."""
        experts = self._model.experts
        if experts is None or phase not in ("experts_gate_up", "experts_down"):
            return min(num_tokens, 1)
        return 1 - float((1 - experts.num_experts_per_token / experts.num_experts) ** num_tokens)

    def _attention(self, starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> Work:
        model, operations, num_bytes = self._model, 0, 0
        element_bytes = 4 if self._cache_format == "float32" else 2
        sequences = np.repeat(np.arange(len(counts)), counts)
        first_tokens = np.cumsum(counts) - counts
        contexts = starts[sequences] + np.arange(len(sequences)) - first_tokens[sequences] + 1
        for window in model.layer_windows:
            seen = contexts if window is None else np.minimum(contexts, window)
            operations += 4 * int(seen.sum()) * model.num_heads * model.head_dim
            keys = starts + counts if window is None else np.minimum(starts + counts, window + counts - 1)
            num_bytes += 2 * int(keys.sum()) * model.num_kv_heads * model.head_dim * element_bytes
        return Work(operations, num_bytes, self._cache_format)


def total_work(works: Iterable[dict[str, Work]]) -> dict[str, Work]:
    """Of several steps."""
    total: dict[str, Work] = {}
    for by_phase in works:
        for phase, work in by_phase.items():
            total[phase] = total[phase] + work if phase in total else work
    return total


def _products_by_phase(model: ModelConfig) -> dict[str, int]:
    """Of one token."""
    hidden, heads = model.hidden_size, model.num_heads * model.head_dim
    products = dict.fromkeys(_LINEARS, 0)
    products["qkv"] = model.num_layers * hidden * (heads + 2 * model.num_kv_heads * model.head_dim)
    products["output"] = model.num_layers * hidden * heads
    products["head"] = hidden * model.vocab_size
    for layer in range(model.num_layers):
        experts = model.experts_of(layer)
        if experts is None:
            products["gate_up"] += hidden * 2 * model.intermediate_size
            products["down"] += hidden * model.intermediate_size
        else:
            inner = experts.num_experts_per_token * experts.intermediate_size
            products["router"] += hidden * experts.num_experts
            products["experts_gate_up"] += hidden * 2 * inner
            products["experts_down"] += hidden * inner
    return {phase: num_products for phase, num_products in products.items() if num_products}


def _bytes_by_phase(model: ModelConfig, weight_format: Format) -> dict[str, int]:
    phases = {linear: phase for phase, linear in _LINEARS.items()}
    num_bytes = dict.fromkeys(_LINEARS, 0)
    for name, spec in packed_specs(model, weight_format).items():
        linear = _LAYER.sub("", name).rpartition(".")[0]
        if linear in phases:
            num_bytes[phases[linear]] += spec.num_bytes
    return num_bytes
