"""The native decoder against plain arithmetic, on every instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import ISAS, Array, Model, Reference, random_weights, tiny

from asyncscale.checkpoint.model_config import ModelConfig

MakeModel = Callable[..., Model]

# Largest difference, as a part of the largest logit: that of sums in float32; elsewhere, a few numbers are rounded the
# other way, where they are near the middle of two, and bfloat16 rounds weights of attention, too.
TOLERANCES = {"float32": 1e-5, "float16": 5e-4, "bfloat16": 0.02, "int8": 0.04}

QWEN3 = {"architectures": ["Qwen3ForCausalLM"]}
BIASED = {"attention_bias": True, "mlp_bias": True}


def window(size: int, **sizes: Any) -> dict[str, Any]:
    return {"architectures": ["MistralForCausalLM"], "sliding_window": size} | sizes


def heads(dim: int, num: int, num_kv: int, **sizes: Any) -> dict[str, Any]:
    return {"head_dim": dim, "num_attention_heads": num, "num_key_value_heads": num_kv} | sizes


def experts(family: str, num: int, num_per_token: int, **sizes: Any) -> dict[str, Any]:
    architectures = [f"{family}ForCausalLM"]
    return {"architectures": architectures, "num_local_experts": num, "num_experts_per_tok": num_per_token} | sizes


# Sizes, format, block size, and the cache's type where the format is int8.
CASES: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "odd sizes": ({}, "float32", 16, "float32"),
    "odd sizes, bfloat16": ({"intermediate_size": 75}, "bfloat16", 5, "float32"),
    "odd sizes, float16": ({"hidden_size": 33}, "float16", 1, "float32"),
    "odd sizes, int8": ({"hidden_size": 77}, "int8", 8, "float32"),
    "head_dim 8": (heads(8, 8, 1), "float32", 8, "float32"),
    "head_dim 64": (heads(64, 9, 3, tie_word_embeddings=True), "bfloat16", 16, "float32"),
    "head_dim 64, int8": (heads(64, 9, 3, intermediate_size=100, hidden_size=160), "int8", 16, "bfloat16"),
    "head_dim 80": (heads(80, 4, 4), "float16", 32, "float32"),
    "head_dim 96, window": (window(7, **heads(96, 2, 1)), "float32", 5, "float32"),
    "head_dim 128, norms": (QWEN3 | heads(128, 4, 2, attention_bias=True), "bfloat16", 16, "float32"),
    "head_dim 256": (heads(256, 2, 1), "float32", 16, "float32"),
    "biases": (BIASED | heads(6, 5, 1), "float32", 24, "float32"),
    "biases, int8": (BIASED | heads(10, 7, 7), "int8", 1, "float16"),
    "window beyond a tile": (window(70), "float16", 8, "float32"),
    "window of one": (window(1), "float32", 16, "float32"),
    "window, bfloat16": (window(17, **heads(20, 6, 2)), "bfloat16", 8, "float32"),
    "experts": (experts("Mixtral", 5, 2), "float32", 16, "float32"),
    # What is rounded may choose another expert than what is not: here all are chosen.
    "experts, bfloat16": (experts("Mixtral", 17, 17, intermediate_size=30), "bfloat16", 16, "float32"),
    "experts, norms over all heads": (experts("Olmoe", 9, 4, clip_qkv=1.5, **heads(18, 4, 2)), "float32", 8, "float32"),
    "experts, float16": (experts("Olmoe", 3, 3, norm_topk_prob=True, hidden_size=33), "float16", 5, "float32"),
    "experts, int8": (experts("Qwen3Moe", 7, 7, moe_intermediate_size=90), "int8", 16, "bfloat16"),
    "experts in some layers": (
        experts("Qwen3Moe", 30, 8, num_hidden_layers=3, mlp_only_layers=[1], moe_intermediate_size=70),
        "float32", 8, "float32",
    ),
    "wide": ({"hidden_size": 257, "intermediate_size": 400, "vocab_size": 190}, "bfloat16", 16, "float32"),
}  # fmt: skip
LENGTHS = {4: 150, 1: 30, 6: 1, 2: 72}  # by row


@cache
def sequences(vocab_size: int) -> dict[int, list[int]]:
    generator = np.random.default_rng(3)
    return {row: generator.integers(0, vocab_size, length).tolist() for row, length in LENGTHS.items()}


@cache
def expected(case: str) -> tuple[ModelConfig, dict[str, Array], dict[int, Array]]:
    sizes, format, _, dtype = CASES[case]
    config = tiny(**sizes)
    weights = random_weights(config)
    reference = Reference(config, weights, format, dtype)
    return config, weights, {row: reference.logits(tokens) for row, tokens in sequences(config.vocab_size).items()}


def assert_near(actual: dict[int, Array], reference: dict[int, Array], tolerance: float) -> None:
    for row, logits in actual.items():
        largest = np.abs(reference[row]).max()
        np.testing.assert_allclose(logits / largest, reference[row] / largest, rtol=0, atol=tolerance, err_msg=f"{row}")


def mixed_chunks(seed: int) -> Callable[[int], int]:
    """Of one row 1, of the others now a single token, now many."""
    generator = np.random.default_rng(seed)
    return lambda row: int(generator.choice([1, 1, 2, 5, 33, 70])) if row != 1 else 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_plain_arithmetic(case: str, isa: str, make_model: MakeModel) -> None:
    _, format, block_size, dtype = CASES[case]
    config, weights, reference = expected(case)
    model = make_model(isa, config, weights, format, block_size=block_size, num_blocks=300, dtype=dtype)
    actual = model.run(sequences(config.vocab_size), mixed_chunks(0))
    assert_near(actual, reference, TOLERANCES[format])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", TOLERANCES)
def test_the_last_panels_of_layers_are_where_they_are_packed(format: str, isa: str, make_model: MakeModel) -> None:
    """A panel is 64 outputs: 32 gates and ups; the last one may hold 16, 32 or 48, of gates and ups half as many."""
    for inner in (1, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65):
        sizes = heads(2 * (inner % 5 + 1), inner % 3 + 1, 1, hidden_size=inner + 2, vocab_size=inner + 7)
        config = tiny(intermediate_size=inner, num_hidden_layers=1, **sizes)
        weights = random_weights(config)
        model = make_model(isa, config, weights, format)
        tokens = np.arange(7) % config.vocab_size
        reference = Reference(config, weights, format).logits(tokens.tolist())
        assert_near(model.run({0: tokens.tolist()}, lambda row: 7), {0: reference}, TOLERANCES[format])


@settings(
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    isa=st.sampled_from(ISAS),
    dim=st.sampled_from([2, 8, 18, 34, 48, 64, 80, 128]),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    hidden=st.integers(2, 90),
    inner=st.integers(1, 140),
    block_size=st.sampled_from([1, 3, 5, 8, 16, 17, 32, 40]),
    span=st.sampled_from([None, 1, 2, 15, 16, 17, 64, 65, 100]),
    seed=st.integers(0, 999),
)
def test_any_shape_and_any_chunks(
    isa: str,
    dim: int,
    num_kv_heads: int,
    group: int,
    hidden: int,
    inner: int,
    block_size: int,
    span: int | None,
    seed: int,
    make_model: MakeModel,
) -> None:
    sizes = heads(dim, num_kv_heads * group, num_kv_heads, hidden_size=hidden, intermediate_size=inner)
    config = tiny(num_hidden_layers=1, **({} if span is None else window(span)), **sizes)
    weights = random_weights(config, seed)
    generator = np.random.default_rng(seed)
    some = {row: generator.integers(0, 83, generator.integers(1, 140)).tolist() for row in (5, 0, 3)}
    actual = make_model(isa, config, weights, block_size=block_size, num_blocks=450).run(some, mixed_chunks(seed), seed)
    reference = Reference(config, weights, "float32")
    assert_near(actual, {row: reference.logits(tokens) for row, tokens in some.items()}, 2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", TOLERANCES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_best_token_is_the_first_of_the_highest_logits(
    threads: int, format: str, isa: str, make_model: MakeModel
) -> None:
    config = tiny(vocab_size=331)
    weights = random_weights(config)
    head = weights["lm_head.weight"]
    head[200:331] = head[:131]  # so that many are equal, in the same lane and in others
    head[150:190] = head[10:50]
    model = make_model(isa, config, weights, format, threads=threads)
    model.start(0, list(range(60)), list(range(4)))
    [logits] = model.step({0: 60}).values()
    indices = np.array([59, *range(40), 3])
    token_ids, highest = model.decoder.best(indices)
    assert (token_ids == logits[indices].argmax(1)).all()
    assert (highest == logits[indices].max(1)).all()
    assert (token_ids < 200).all()
    assert len(set(token_ids.tolist())) > 10


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("token", [0, 77, 82])  # 82 is the last one before padding
def test_a_logit_that_is_no_number_is_the_best(token: int, isa: str, make_model: MakeModel) -> None:
    config = tiny()
    weights = random_weights(config)
    weights["lm_head.weight"][token, 3] = np.nan
    model = make_model(isa, config, weights, threads=2)
    model.start(0, list(range(20)), [5, 2])
    model.step({0: 20})
    token_ids, highest = model.decoder.best(np.array([0, 19]))
    assert np.isnan(highest).all()
    assert (token_ids == token).all()
