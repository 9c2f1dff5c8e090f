"""A model's weights as the native kernels want them: which arrays there are, and how to fill them.

::

    specs = packed_specs(config, "int8")
    tensors = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}
    packer = Packer(config, "int8", tensors)
    for name, values in read_weights(files, config):
        packer.write(name, values)

Linear layers are `layers.{i}.qkv` (queries, keys, values below one another), `.o`, `.gate_up` (in each panel first the
gates, then the same outputs' ups) and `.down`, and `head`. Each is a `.weight` (see panels.py), a `.bias` where the
model has one, and in int8 `.scales`: of each output, in the order of the packed outputs, zero in padding.
`.down` has as many inputs as `.gate_up` has pairs, padding included. A layer with experts has `.experts.gate_up` and
`.experts.down` instead, whose arrays have a first dimension of experts, and `.router`, float32 in every format.
The others are `layers.{i}.input_norm`, `.post_attention_norm` and `.qk_norm` (a row for each query head, then for each
key head), `norm`, and `embedding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.errors import ModelLoadError
from asyncscale.model.panels import (
    ELEMENT_TYPES,
    OUTPUT_MULTIPLE,
    Columns,
    ElementType,
    Float32,
    PackedLinear,
    encode,
    round_up,
)

WeightFormat = Literal["float32", "bfloat16", "float16", "int8"]

PACKING_VERSION = 2  # goes up with every change of what is packed, or how

_INT8_EMBEDDING: WeightFormat = "bfloat16"
_INT8_HEAD: WeightFormat = "int8"

_NORMS = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An array to be. dtype: numpy's name of it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class _Linear:
    """What the parts of a packed linear layer have in common. num_inputs: padded for its element type.

    num_experts: that have such a layer each; None where it is the only one.
    """

    element: ElementType
    num_outputs: int
    num_inputs: int
    bias: bool = False
    num_experts: int | None = None


def head_format(weight_format: WeightFormat) -> WeightFormat:
    """The format of the head in a model of `weight_format`."""
    return _INT8_HEAD if weight_format == "int8" else weight_format


def packed_specs(config: ModelConfig, weight_format: WeightFormat) -> dict[str, TensorSpec]:
    """Name, type and shape of all packed arrays of a model."""
    hidden = config.hidden_size
    specs = {
        "embedding": TensorSpec(_embedding_element(weight_format).dtype, (config.vocab_size, hidden)),
        "norm": TensorSpec("float32", (hidden,)),
    }
    for index in range(config.num_layers):
        for norm in _NORMS.values():
            specs[f"layers.{index}.{norm}"] = TensorSpec("float32", (hidden,))
        if config.qk_norm:
            shape = (config.num_heads + config.num_kv_heads, config.head_dim)
            specs[f"layers.{index}.qk_norm"] = TensorSpec("float32", shape)
    for name, linear in _linears(config, weight_format).items():
        specs |= {f"{name}.{part}": spec for part, spec in _linear_specs(linear)}
    return specs


class Packer:
    """Writes a checkpoint's tensors into the arrays of `packed_specs`, which are zero; in any order, each once."""

    def __init__(self, config: ModelConfig, weight_format: WeightFormat, tensors: dict[str, npt.NDArray[Any]]) -> None:
        self._config = config
        self._format = weight_format
        self._tensors = tensors
        self._linears = {
            name: [PackedLinear(arrays, linear.element, linear.num_inputs) for arrays in _arrays(tensors, name, linear)]
            for name, linear in _linears(config, weight_format).items()
        }
        self._places = _places(config)

    def write(self, name: str, values: Float32) -> None:
        """name: Hugging Face's. Raises ModelLoadError where values are too large for the format."""
        try:
            self._write(name, np.ascontiguousarray(values))
        except OverflowError as error:
            raise ModelLoadError(f"tensor {name!r} cannot be {self._format}: {error}. Choose another dtype") from None

    def _write(self, name: str, values: Float32) -> None:
        module, kind = name.rsplit(".", 1)
        if module == "model.embed_tokens":
            self._write_embedding(values)
        elif module == "lm_head":
            self._linears["head"][0].write(values, Columns())
        elif module == "model.norm":
            self._tensors["norm"][:] = values
        else:
            _, _, index, part = module.split(".", 3)
            self._write_part(f"layers.{index}", part, kind, values)

    def _write_embedding(self, values: Float32) -> None:
        element = _embedding_element(self._format)
        packed = self._tensors["embedding"]
        for start in range(0, len(values), 256):  # what fits a CPU's caches
            packed[start : start + 256] = encode(values[start : start + 256], element.name)

    def _write_part(self, layer: str, part: str, kind: str, values: Float32) -> None:
        if norm := _NORMS.get(part):
            self._tensors[f"{layer}.{norm}"][:] = values
        elif part == "self_attn.q_norm":
            self._tensors[f"{layer}.qk_norm"][: self._config.num_heads] = values.reshape(-1, self._config.head_dim)
        elif part == "self_attn.k_norm":
            self._tensors[f"{layer}.qk_norm"][self._config.num_heads :] = values.reshape(-1, self._config.head_dim)
        elif part.startswith("mlp.experts."):
            expert, name = part.removeprefix("mlp.experts.").split(".")
            linear, columns = self._places[f"mlp.{name}"]
            self._linears[f"{layer}.experts.{linear}"][int(expert)].write(values, columns)
        else:
            linear, columns = self._places[part]
            [packed] = self._linears[f"{layer}.{linear}"]
            (packed.write_bias if kind == "bias" else packed.write)(values, columns)


def _embedding_element(weight_format: WeightFormat) -> ElementType:
    return ELEMENT_TYPES[_INT8_EMBEDDING if weight_format == "int8" else weight_format]


def _places(config: ModelConfig) -> dict[str, tuple[str, Columns]]:
    """Of each linear layer in the checkpoint: which packed one it is part of, and where in it."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.q_proj": ("qkv", Columns(0)),
        "self_attn.k_proj": ("qkv", Columns(queries)),
        "self_attn.v_proj": ("qkv", Columns(queries + keys)),
        "self_attn.o_proj": ("o", Columns()),
        "mlp.gate": ("router", Columns()),
        "mlp.gate_proj": ("gate_up", Columns(half=0)),
        "mlp.up_proj": ("gate_up", Columns(half=1)),
        "mlp.down_proj": ("down", Columns()),
    }


def _linears(config: ModelConfig, weight_format: WeightFormat) -> dict[str, _Linear]:
    head = ELEMENT_TYPES[head_format(weight_format)]
    linears = {
        f"layers.{index}.{name}": linear
        for index in range(config.num_layers)
        for name, linear in _layer_linears(config, index, ELEMENT_TYPES[weight_format]).items()
    }
    linears["head"] = _Linear(head, config.vocab_size, round_up(config.hidden_size, head.group))
    return linears


def _layer_linears(config: ModelConfig, index: int, element: ElementType) -> dict[str, _Linear]:
    hidden, inputs = config.hidden_size, round_up(config.hidden_size, element.group)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "qkv": _Linear(element, queries + 2 * keys, inputs, config.qkv_bias),
        "o": _Linear(element, hidden, round_up(queries, element.group), config.o_bias),
    }
    experts = config.experts_of(index)
    if experts is None:
        inner = round_up(config.intermediate_size, OUTPUT_MULTIPLE)
        return linears | {
            "gate_up": _Linear(element, 2 * inner, inputs, config.mlp_bias),
            "down": _Linear(element, hidden, inner, config.mlp_bias),
        }
    inner = round_up(experts.intermediate_size, OUTPUT_MULTIPLE)
    return linears | {
        "router": _Linear(ELEMENT_TYPES["float32"], experts.num_experts, hidden),
        "experts.gate_up": _Linear(element, 2 * inner, inputs, num_experts=experts.num_experts),
        "experts.down": _Linear(element, hidden, inner, num_experts=experts.num_experts),
    }


def _linear_specs(linear: _Linear) -> Iterator[tuple[str, TensorSpec]]:
    num_outputs = round_up(linear.num_outputs, OUTPUT_MULTIPLE)
    experts = () if linear.num_experts is None else (linear.num_experts,)
    yield "weight", TensorSpec(linear.element.dtype, (*experts, num_outputs * linear.num_inputs))
    if linear.bias:
        yield "bias", TensorSpec("float32", (*experts, num_outputs))
    if linear.element.name == "int8":
        yield "scales", TensorSpec("float32", (*experts, num_outputs))


def _arrays(tensors: Mapping[str, npt.NDArray[Any]], name: str, linear: _Linear) -> list[dict[str, npt.NDArray[Any]]]:
    """Those of the layer, or of each of its experts."""
    arrays = {part: tensors[f"{name}.{part}"] for part, _ in _linear_specs(linear)}
    if linear.num_experts is None:
        return [arrays]
    return [{part: array[expert] for part, array in arrays.items()} for expert in range(linear.num_experts)]
