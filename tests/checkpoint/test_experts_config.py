"""What config.json says about experts: transformers' names, and its values where they are missing."""

from __future__ import annotations

from typing import Any

import pytest

from asyncscale.checkpoint.experts_config import ExpertsConfig
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.checkpoint.weight_counts import WeightCounts
from asyncscale.errors import ModelLoadError

BASE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def parse(family: str, **changes: object) -> ModelConfig:
    return ModelConfig.parse(BASE | {"architectures": [f"{family}ForCausalLM"]} | changes, "config.json")


def experts(**changes: Any) -> ExpertsConfig:
    common = {"num_experts": 8, "num_experts_per_token": 2, "intermediate_size": 96, "normalizes": False}
    return ExpertsConfig(**(common | {"layers": (True,) * 4} | changes))


@pytest.mark.parametrize(("family", "eps"), [("Mixtral", 1e-5), ("Olmoe", 1e-5), ("Qwen3Moe", 1e-6), ("Llama", 1e-6)])
def test_what_is_not_mentioned_is_as_transformers_takes_it(family: str, eps: float) -> None:
    assert parse(family).rms_norm_eps == eps


QWEN3 = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("Mixtral", {}, experts(normalizes=True)),
        ("Mixtral", {"num_local_experts": 5}, experts(num_experts=5, normalizes=True)),
        ("Mixtral", {"num_experts_per_tok": 4}, experts(num_experts_per_token=4, normalizes=True)),
        ("Olmoe", {}, experts(num_experts=64, num_experts_per_token=8)),
        ("Olmoe", {"norm_topk_prob": True}, experts(num_experts=64, num_experts_per_token=8, normalizes=True)),
        ("Qwen3Moe", {}, experts(num_experts=128, num_experts_per_token=8, intermediate_size=768)),
        ("Qwen3Moe", QWEN3 | {"num_experts": 8}, experts(intermediate_size=32)),
        ("Qwen3Moe", QWEN3 | {"num_local_experts": 8}, experts(intermediate_size=32)),  # as transformers 5 names it
    ],
)
def test_experts_are_read(family: str, changes: dict[str, Any], expected: ExpertsConfig) -> None:
    config = parse(family, **changes)
    assert config.experts == expected
    assert all(config.experts_of(layer) == expected for layer in range(4))


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"mlp_only_layers": [0, 3]}, (False, True, True, False)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, (False, False, False, True)),
        ({"mlp_only_layers": None}, (True,) * 4),
    ],
)
def test_some_layers_of_qwen3_are_plain(changes: dict[str, Any], layers: tuple[bool, ...]) -> None:
    config = parse("Qwen3Moe", **changes)
    assert config.experts is not None
    assert config.experts.layers == layers
    assert tuple(config.experts_of(layer) is not None for layer in range(4)) == layers


@pytest.mark.parametrize("changes", [{"num_experts": 0}, {"mlp_only_layers": [0, 1, 2, 3]}, {"decoder_sparse_step": 5}])
def test_no_layer_may_have_experts(changes: dict[str, Any]) -> None:
    assert parse("Qwen3Moe", **changes).experts is None


def test_other_architectures_have_none() -> None:
    assert parse("Llama", num_experts=8).experts is None


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("Mixtral", {}, (False, False, False, False, None)),
        ("Qwen3Moe", {"attention_bias": True, "clip_qkv": 3.0}, (True, True, True, False, None)),
        ("Olmoe", {}, (False, False, True, True, None)),
        ("Olmoe", {"clip_qkv": 8, "attention_bias": True}, (True, True, True, True, 8.0)),
    ],
)
def test_what_is_special_of_attention(family: str, changes: dict[str, Any], expected: tuple[object, ...]) -> None:
    config = parse(family, **changes)
    found = config.qkv_bias, config.o_bias, config.qk_norm, config.qk_norm_spans_heads, config.qkv_limit
    assert found == expected
    assert config.head_dim == 8


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("Mixtral", {}, (None,) * 4),
        ("Mixtral", {"sliding_window": 7}, (7,) * 4),
        ("Qwen3Moe", {"sliding_window": 7}, (None,) * 4),
        ("Qwen3Moe", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2}, (7,) * 4),
        ("Olmoe", {"sliding_window": 7}, (None,) * 4),
    ],
)
def test_windows_are_those_of_transformers(family: str, changes: dict[str, Any], windows: tuple[int | None]) -> None:
    assert parse(family, **changes).layer_windows == windows


def test_mixtral_has_a_rope_theta_of_its_own() -> None:
    assert parse("Mixtral").rope.theta == 1e6
    assert parse("Mixtral", rope_theta=5e5).rope.theta == 5e5
    assert parse("Mixtral", rope_parameters={"rope_type": "default", "rope_theta": 2e4}).rope.theta == 2e4
    assert parse("Olmoe").rope.theta == 1e4


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Mixtral", {"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must be between 1 and .* experts \(8\)"),
        ("Olmoe", {"num_experts_per_tok": 0}, r"num_experts_per_tok \(0\) must be between 1"),
        ("Olmoe", {"num_experts": "many"}, "experts: Expected `int`, got `str`"),
        ("Qwen3Moe", {"moe_intermediate_size": 0}, "the size of experts must be positive, got 0"),
        ("Qwen3Moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer, got 0"),
        ("Qwen3Moe", {"mlp_only_layers": 3}, "mlp_only_layers must be a list of layers, got 3"),
        ("Qwen3Moe", {"shared_expert_intermediate_size": 128}, "experts that all tokens share .* are not supported"),
        ("Olmoe", {"n_shared_experts": 1}, r"share \(n_shared_experts is 1\) are not supported"),
        ("Olmoe", {"clip_qkv": 0}, "clip_qkv must be positive, got 0"),
        ("Qwen2Moe", {}, "'Qwen2MoeForCausalLM' is not supported; supported are .*Qwen3MoeForCausalLM"),
    ],
)
def test_what_is_not_supported_is_named(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=f"config.json: .*{message}"):
        parse(family, **changes)


def test_weights_are_counted() -> None:
    attention, embedding = 64 * 64 * 2 + 64 * 16 * 2, 64_000
    plain = WeightCounts.of(parse("Llama"))
    assert plain.every_step == 4 * (attention + 3 * 64 * 96) + embedding
    assert (plain.total, plain.per_token) == (plain.every_step + embedding, 0)
    changes = {"decoder_sparse_step": 2, "num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
    mixed = WeightCounts.of(parse("Qwen3Moe", tie_word_embeddings=True, **changes))
    assert mixed.every_step == 4 * attention + 2 * 3 * 64 * 96 + 2 * 64 * 10 + embedding
    assert mixed.total == mixed.every_step + 2 * 10 * 3 * 64 * 32
    assert mixed.per_token == 2 * 3 * 3 * 64 * 32
