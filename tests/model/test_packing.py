from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.errors import ModelLoadError
from asyncscale.model.packing import Packer, WeightFormat, packed_specs
from asyncscale.model.panels import Columns, bfloat16_bits, quantize
from asyncscale.model.weights import weight_shapes

Float32 = np.ndarray[Any, np.dtype[np.float32]]

GROUPS = {"float32": 1, "float16": 1, "bfloat16": 2, "int8": 4}
FORMATS: tuple[WeightFormat, ...] = ("float32", "bfloat16", "float16", "int8")
# Qwen's have biases and norms of heads; none of these sizes is a multiple of what it is padded to.
SIZES = [
    {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 50, "intermediate_size": 75, "num_attention_heads": 5},
    {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 33, "intermediate_size": 49, "num_attention_heads": 3},
    {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 8,
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False,
    },
    {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 33, "intermediate_size": 49, "num_attention_heads": 3,
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 21, "mlp_only_layers": [0],
    },
    {
        "architectures": ["OlmoeForCausalLM"], "hidden_size": 50, "intermediate_size": 17, "num_attention_heads": 5,
        "num_experts": 3, "num_experts_per_tok": 2,
    },
]  # fmt: skip


def config_of(sizes: dict[str, Any]) -> ModelConfig:
    common = {
        "vocab_size": 131, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 6,
        "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    return ModelConfig.parse(common | sizes, "test")


def checkpoint(config: ModelConfig) -> dict[str, Float32]:
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(shape, np.float32) for name, shape in weight_shapes(config).items()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


def packed(config: ModelConfig, weight_format: WeightFormat, source: dict[str, Float32]) -> dict[str, Any]:
    tensors = {name: np.zeros(spec.shape, spec.dtype) for name, spec in packed_specs(config, weight_format).items()}
    packer = Packer(config, weight_format, tensors)
    for name, values in source.items():
        packer.write(name, values)
    return tensors


def pad(matrix: Float32, num_rows: int, num_columns: int) -> Float32:
    result = np.zeros((num_rows, num_columns), np.float32)
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result


def up_to(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


def in_panels(matrix: Any, group: int) -> Any:
    """What packing.py documents, element by element. matrix: padded."""
    outputs, inputs = matrix.shape
    result = []
    for start in range(0, outputs, 64):
        width = min(64, outputs - start)
        for first_input in range(0, inputs, group):
            for output in range(start, start + width):
                result += matrix[output, first_input : first_input + group].tolist()
    return np.array(result, matrix.dtype)


def gates_beside_ups(gate: Any, up: Any) -> Any:
    """The rows in the order of gate_up's outputs; both padded to a multiple of 16 rows."""
    rows = []
    for start in range(0, len(gate), 32):
        rows += [*gate[start : start + 32], *up[start : start + 32]]
    return np.array(rows)


def stored(matrix: Float32, weight_format: WeightFormat) -> Any:
    if weight_format == "bfloat16":
        return torch.from_numpy(matrix).bfloat16().view(torch.uint16).numpy()
    return matrix.astype(weight_format)


def expected_linears(config: ModelConfig, source: dict[str, Float32]) -> dict[str, tuple[Float32, Float32 | None]]:
    """Weight and bias of the packed layers, their outputs in order and padded."""
    linears: dict[str, tuple[Float32, Float32 | None]] = {}

    def get(name: str, kind: str) -> Float32:
        return source[f"model.layers.{index}.{name}.{kind}"]

    def add_mlp(name: str, original: str, inner_size: int) -> None:
        inner = up_to(inner_size, 16)
        gate, up = (pad(get(f"{original}.{part}_proj", "weight"), inner, config.hidden_size) for part in ("gate", "up"))
        bias = None
        if config.mlp_bias:
            both = [pad(get(f"{original}.{part}_proj", "bias")[:, None], inner, 1) for part in ("gate", "up")]
            bias = gates_beside_ups(*both)[:, 0]
        linears[f"{name}.gate_up"] = gates_beside_ups(gate, up), bias
        down = get(f"{original}.down_proj", "weight")
        bias = get(f"{original}.down_proj", "bias") if config.mlp_bias else None
        linears[f"{name}.down"] = pad(down, len(down), inner), bias

    for index in range(config.num_layers):
        parts = [f"self_attn.{part}_proj" for part in "qkv"]
        qkv = np.concatenate([get(part, "weight") for part in parts])
        bias = np.concatenate([get(part, "bias") for part in parts]) if config.qkv_bias else None
        linears[f"layers.{index}.qkv"] = qkv, bias
        bias = get("self_attn.o_proj", "bias") if config.o_bias else None
        linears[f"layers.{index}.o"] = get("self_attn.o_proj", "weight"), bias
        experts = config.experts_of(index)
        if experts is None:
            add_mlp(f"layers.{index}", "mlp", config.intermediate_size)
            continue
        linears[f"layers.{index}.router"] = get("mlp.gate", "weight"), None
        for expert in range(experts.num_experts):
            add_mlp(f"layers.{index}.experts.{expert}", f"mlp.experts.{expert}", experts.intermediate_size)
    linears["head"] = source["lm_head.weight"], None
    return linears


def by_expert(tensors: dict[str, Any]) -> dict[str, Any]:
    """Each expert's arrays under a name of their own: `layers.0.experts.2.down.weight`."""
    result = {}
    for name, array in tensors.items():
        layer, dot, part = name.partition(".experts.")
        result |= {f"{layer}.experts.{i}.{part}": one for i, one in enumerate(array)} if dot else {name: array}
    return result


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: sizes["architectures"][0])
def test_every_element_is_where_the_layout_says(sizes: dict[str, Any], weight_format: WeightFormat) -> None:
    config = config_of(sizes)
    source = checkpoint(config)
    tensors = by_expert(packed(config, weight_format, source))
    for name, (weight, bias) in expected_linears(config, source).items():
        element = "float32" if name.endswith(".router") else weight_format
        group = GROUPS[element]
        outputs, inputs = up_to(len(weight), 16), up_to(weight.shape[1], group)
        if element == "int8":
            numbers, scales = quantize(weight)
            numbers[:, ~weight.any(axis=0)] = 0  # padding, where nothing is written: its inputs are zero,
            numbers[~weight.any(axis=1)] = 0  # or its scales are
            elements = pad(numbers, outputs, inputs).astype(np.uint8)
            assert np.array_equal(tensors.pop(f"{name}.scales"), pad(scales[:, None], outputs, 1)[:, 0])
        else:
            elements = stored(pad(weight, outputs, inputs), element)
        actual = tensors.pop(f"{name}.weight")
        assert actual.dtype == elements.dtype
        assert np.array_equal(actual, in_panels(elements, group)), name
        if bias is not None:
            assert np.array_equal(tensors.pop(f"{name}.bias"), pad(bias[:, None], outputs, 1)[:, 0]), name
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        for norm, original in (("input", "input_layernorm"), ("post_attention", "post_attention_layernorm")):
            assert np.array_equal(tensors.pop(f"layers.{index}.{norm}_norm"), source[f"{layer}.{original}.weight"])
        if config.qk_norm:
            q, k = (source[f"{layer}.self_attn.{part}_norm.weight"] for part in "qk")
            rows = [q] * config.num_heads + [k] * config.num_kv_heads
            if config.qk_norm_spans_heads:
                rows = np.concatenate([q, k]).reshape(-1, config.head_dim)
            assert np.array_equal(tensors.pop(f"layers.{index}.qk_norm"), rows)
    assert np.array_equal(tensors.pop("norm"), source["model.norm.weight"])
    embedding = stored(source["model.embed_tokens.weight"], "bfloat16" if weight_format == "int8" else weight_format)
    assert np.array_equal(tensors.pop("embedding"), embedding)
    assert tensors == {}


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 32, 40, 75, 96])
def test_halves_share_every_panel(half: int, num_rows: int) -> None:
    padded = 2 * up_to(num_rows, 16)
    outputs = np.full(num_rows, -1)
    for rows, first, last in Columns(half=half).runs(num_rows, padded):
        outputs[rows] = np.arange(first, last)
    numbered = np.arange(up_to(num_rows, 16))
    order = gates_beside_ups(numbered, numbered + 1000)
    assert [order[output] for output in outputs] == (numbered[:num_rows] + 1000 * half).tolist()


def test_bfloat16_rounds_to_nearest_with_ties_to_even_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint64).astype(np.uint32)
    bits[:1000] = bits[:1000] & 0xFFFF0000 | 0x8000  # ties
    bits[1000:1004] = [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFFFFFFFF]  # infinities, the largest, a NaN of all ones
    values = bits.view(np.float32)
    numbers = values[~np.isnan(values)]
    expected = torch.from_numpy(numbers.copy()).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(bfloat16_bits(numbers), expected)
    widened = (bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(np.isnan(widened), np.isnan(values))


def test_int8_is_the_nearest_whole_number_of_the_rows_scale() -> None:
    rows = np.random.default_rng(0).standard_normal((40, 333), np.float32)
    rows *= np.logspace(-20, 20, 40, dtype=np.float32)[:, None]
    stored, scales = quantize(rows)
    numbers = stored.astype(np.int64) - 128
    assert np.array_equal(scales, np.abs(rows).max(axis=1) / np.float32(127))
    assert (np.abs(numbers).max(axis=1) == 127).all()
    error = np.abs(numbers * scales[:, None].astype(np.float64) - rows) / scales[:, None]
    assert error.max() <= 0.5 + 1e-5


def test_int8_halves_round_to_even() -> None:
    stored, _ = quantize(np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], np.float32))
    assert (stored.astype(int) - 128).tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_int8_rows_of_zeros_of_almost_nothing_and_of_no_numbers() -> None:
    rows = np.zeros((4, 8), np.float32)
    rows[1] = 2.66e-43  # a scale of this would be rounded so much that the numbers exceeded 127
    rows[2, 3] = np.nan
    rows[3, 3] = -np.inf
    stored, scales = quantize(rows)
    assert (stored == 128).all()
    assert scales[:2].tolist() == [0, 0]
    assert np.isnan(scales[2:]).all()  # so that whatever is computed from it is seen to be no number


def test_what_float16_cannot_hold_is_refused() -> None:
    config = config_of(SIZES[0])
    source = checkpoint(config)
    source["model.layers.1.mlp.down_proj.weight"][3, 4] = 70_000
    with pytest.raises(ModelLoadError, match=r"'model.layers.1.mlp.down_proj.weight' cannot be float16: 70000.0 is"):
        packed(config, "float16", source)
