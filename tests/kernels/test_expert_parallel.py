"""Experts that are dealt out to several engines, here threads of one process: as if each had all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from group_of_threads import GroupOfThreads, Member
from tiny_models import ISAS, Array, Model, random_weights, tiny

from asyncscale.tandem.collective_errors import CollectiveError

MakeModel = Callable[..., Model]

FORMATS = [("float32", "float32"), ("bfloat16", ""), ("int8", "bfloat16")]
SIZES: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
CONFIGS = {
    "Mixtral": tiny(**SIZES, architectures=["MixtralForCausalLM"], num_local_experts=5, num_experts_per_tok=2),
    "Qwen3Moe": tiny(
        **SIZES, architectures=["Qwen3MoeForCausalLM"], num_experts=9, num_experts_per_tok=4, moe_intermediate_size=70,
        mlp_only_layers=[1], norm_topk_prob=True,
    ),
    "Olmoe": tiny(**SIZES, architectures=["OlmoeForCausalLM"], num_experts=3, num_experts_per_tok=2, clip_qkv=2.0),
}  # fmt: skip
WEIGHTS = {name: random_weights(config) for name, config in CONFIGS.items()}
_generator = np.random.default_rng(7)
SEQUENCES = {row: _generator.integers(0, 83, length).tolist() for row, length in enumerate([70, 1, 40, 9, 33])}
# Which engine computes which sequences: others have nothing to do, or not at first, or only at first.
DEALS = {2: [[0, 1, 2, 3], [4]], 3: [[0, 4], [], [1, 2, 3]], 4: [[1], [0], [2, 3, 4], []]}


def chunks(row: int) -> int:
    return 3 + 5 * row


def same(actual: Array, expected: Array) -> bool:
    return np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("isa", ISAS[:1])
@pytest.mark.parametrize("num_engines", DEALS)
@pytest.mark.parametrize(("format", "dtype"), FORMATS, ids=lambda name: name)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_bit_by_bit_those_of_an_engine_with_all_experts(
    family: str, format: str, dtype: str, num_engines: int, isa: str, make_model: MakeModel
) -> None:
    config, weights = CONFIGS[family], WEIGHTS[family]
    whole = make_model(isa, config, weights, format, dtype=dtype)
    expected = whole.run(SEQUENCES, chunks)
    group = GroupOfThreads(num_engines)
    models = [
        make_model(isa, config, weights, format, dtype=dtype, threads=1 + i % 2, group=member)
        for i, member in enumerate(group.members)
    ]

    def compute(member: Member) -> dict[int, Array]:
        model = models[member.engine_id]
        for _ in range(member.engine_id):
            model.step_without_tokens()
        own = {row: SEQUENCES[row] for row in DEALS[num_engines][member.engine_id]}
        logits = model.run(own, chunks, seed=member.engine_id)
        while model.num_steps < whole.num_steps + num_engines:
            model.step_without_tokens()
        return logits

    actual = {row: logits for part in group.run(compute) for row, logits in part.items()}
    assert actual.keys() == expected.keys()
    assert all(same(actual[row], expected[row]) for row in expected)


@pytest.mark.parametrize("exchange", range(6))
@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_whose_exchange_fails_is_given_up_and_can_be_made_again(
    threads: int, exchange: int, make_model: MakeModel
) -> None:
    """Two exchanges in each of the three layers."""
    config, weights = CONFIGS["Olmoe"], WEIGHTS["Olmoe"]
    tokens = SEQUENCES[0]
    [expected] = make_model(ISAS[0], config, weights).run({0: tokens}, lambda row: 30).values()
    group = GroupOfThreads(2)
    models = [make_model(ISAS[0], config, weights, threads=threads, group=member) for member in group.members]
    models[0].start(0, tokens, range(10))

    def step(member: Member) -> Array | None:
        if member.engine_id == 0:
            return models[0].step({0: 30})[0]
        return models[1].step_without_tokens()

    def fail(number: int) -> None:
        if number == 6 + exchange:
            raise failure

    failure = CollectiveError("as if another engine was gone")
    group.members[1].before_exchange = fail
    first = group.run(step)[0]
    assert first is not None
    assert same(first, expected[:30])
    with pytest.raises(CollectiveError):
        group.run(step)
    second = group.run(step)[0]
    assert second is not None
    assert same(second, expected[30:60])


def test_what_fails_in_the_exchange_is_raised_as_it_is(make_model: MakeModel) -> None:
    group = GroupOfThreads(1)
    model = make_model(ISAS[0], CONFIGS["Mixtral"], WEIGHTS["Mixtral"], group=group.members[0])
    failure = KeyboardInterrupt()

    def fail(number: int) -> None:
        raise failure

    group.members[0].before_exchange = fail
    with pytest.raises(KeyboardInterrupt) as caught:
        model.step_without_tokens()
    assert caught.value is failure


def test_before_the_group_has_joined_an_engine_is_alone(make_model: MakeModel) -> None:
    config, weights = CONFIGS["Mixtral"], WEIGHTS["Mixtral"]
    member = GroupOfThreads(2).members[1]
    member.joined = False
    model = make_model(ISAS[0], config, weights, group=member)
    # As if what the experts elsewhere make of a token was nothing.
    weights = {
        name: np.zeros_like(values) if ".experts.0." in name or ".experts.1." in name else values
        for name, values in weights.items()
    }
    expected = make_model(ISAS[0], config, weights).run(SEQUENCES, chunks)
    actual = model.run(SEQUENCES, chunks)
    assert all(same(actual[row], expected[row]) for row in expected)
    assert member.num_exchanges == 0
