"""How much a step of the native decoder has to multiply and to read, part by part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.kernels.library import Format
from asyncscale.kernels.limits import Limits
from asyncscale.model.packing import head_format, packed_specs

_LINEARS = {"qkv": "qkv", "output": "o", "gate_up": "gate_up", "down": "down"}  # phase: its name in packing.py


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
    """

    def __init__(self, model: ModelConfig, weight_format: Format, cache_format: Format) -> None:
        self._model = model
        self._formats = dict.fromkeys(_LINEARS, weight_format) | {"head": head_format(weight_format)}
        self._cache_format = cache_format
        self._num_bytes = _bytes_by_phase(model, weight_format)
        hidden, heads = model.hidden_size, model.num_heads * model.head_dim
        self._num_products = {
            "qkv": model.num_layers * hidden * (heads + 2 * model.num_kv_heads * model.head_dim),
            "output": model.num_layers * hidden * heads,
            "gate_up": model.num_layers * hidden * 2 * model.intermediate_size,
            "down": model.num_layers * hidden * model.intermediate_size,
            "head": hidden * model.vocab_size,
        }

    @property
    def weight_bytes(self) -> int:
        """What has to be read for every step, whatever is in it."""
        return sum(self._num_bytes.values())

    def of(self, starts: npt.NDArray[np.integer], counts: npt.NDArray[np.integer], num_logits: int) -> dict[str, Work]:
        """starts, counts: of each sequence, the position of its first new token and how many there are."""
        num_tokens = {"head": num_logits}
        works = {
            phase: Work(
                2 * num_products * num_tokens.get(phase, int(counts.sum())),
                self._num_bytes[phase] if num_tokens.get(phase, 1) else 0,
                self._formats[phase],
            )
            for phase, num_products in self._num_products.items()
        }
        return works | {"attention": self._attention(starts.astype(np.int64), counts.astype(np.int64))}

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


def _bytes_by_phase(model: ModelConfig, weight_format: Format) -> dict[str, int]:
    phases = {name: phase for phase, name in _LINEARS.items()} | {"head": "head"}
    num_bytes = dict.fromkeys(phases.values(), 0)
    for name, spec in packed_specs(model, weight_format).items():
        linear = name.split(".")[-2] if "." in name else name
        if linear in phases:
            num_bytes[phases[linear]] += spec.num_bytes
    return num_bytes
