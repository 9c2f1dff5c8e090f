"""What is computed of a token is bitwise the same whatever is computed beside it, and unharmed by whatever that is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tiny_models import ISAS, Array, Model, random_weights, tiny

MakeModel = Callable[..., Model]

FORMATS = [("float32", "float32"), ("bfloat16", ""), ("float16", ""), ("int8", "bfloat16")]
CONFIG = tiny(  # with biases, and a window in its second layer
    architectures=["Qwen2ForCausalLM"], use_sliding_window=True, sliding_window=90, max_window_layers=1,
    head_dim=34, num_attention_heads=6, num_key_value_heads=2, hidden_size=70, intermediate_size=100, vocab_size=131,
)  # fmt: skip
EXPERTS = tiny(  # with norms over all heads
    architectures=["OlmoeForCausalLM"], num_experts=11, num_experts_per_tok=3, clip_qkv=2.0,
    head_dim=34, num_attention_heads=6, num_key_value_heads=2, hidden_size=70, intermediate_size=100, vocab_size=131,
)  # fmt: skip
WEIGHTS = random_weights(CONFIG)
MODELS = {"plain": (CONFIG, WEIGHTS), "experts": (EXPERTS, random_weights(EXPERTS))}
_generator = np.random.default_rng(5)
SEQUENCES = {row: _generator.integers(0, 130, length).tolist() for row, length in {3: 107, 0: 1, 5: 66, 1: 40}.items()}
SPOILT_TOKEN = 130


def assert_same(actual: dict[int, Array], expected: dict[int, Array], case: object) -> None:
    for row, logits in actual.items():
        assert np.array_equal(logits.view(np.uint32), expected[row].view(np.uint32)), (row, case)


def random_chunks(*sizes: int) -> Callable[[int], int]:
    generator = np.random.default_rng(sum(sizes))
    return lambda row: int(generator.choice(sizes))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "dtype"), FORMATS, ids=lambda name: name)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same_alone_in_any_chunks_company_and_blocks_and_by_any_threads(
    name: str, format: str, dtype: str, isa: str, make_model: MakeModel
) -> None:
    def make(threads: int) -> Model:
        return make_model(isa, *MODELS[name], format, threads=threads, block_size=8, num_blocks=100, dtype=dtype)

    model = make(1)
    alone = {row: model.run({row: tokens}, lambda row: 512)[row] for row, tokens in SEQUENCES.items()}
    assert all(np.isfinite(logits).all() for logits in alone.values())
    for seed, (threads, chunks) in enumerate([(1, (1,)), (2, (1, 2, 9, 50)), (3, (512,)), (5, (3, 17))]):
        model = make(threads)
        assert model.decoder.num_threads == threads
        assert_same(model.run(SEQUENCES, random_chunks(*chunks), seed), alone, (threads, chunks))
    # Now in blocks that others have left behind.
    assert_same(model.run(dict(reversed(SEQUENCES.items())), random_chunks(1, 30), 4), alone, "again")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "dtype"), FORMATS, ids=lambda name: name)
def test_tokens_that_are_taken_back_leave_no_trace(format: str, dtype: str, isa: str, make_model: MakeModel) -> None:
    """Guesses of what follows are computed, found wrong, and replaced."""
    model = make_model(isa, CONFIG, WEIGHTS, format, block_size=8, num_blocks=100, dtype=dtype)
    tokens, wrong = SEQUENCES[5], SEQUENCES[1]
    [expected] = model.run({0: tokens}, lambda row: 512).values()
    blocks = list(range(20))
    for num_right in (1, 13, 16, 41):
        model.start(0, tokens[:num_right] + wrong[:25], blocks)
        model.step({0: num_right})
        model.step({0: 25})
        model.start(0, tokens, blocks)
        model.set_computed(0, num_right)
        [logits] = model.step({0: len(tokens) - num_right}).values()
        assert_same({0: logits}, {0: expected[num_right:]}, num_right)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "dtype"), FORMATS, ids=lambda name: name)
@pytest.mark.parametrize(("name", "number"), [("plain", np.inf), ("plain", np.nan), ("experts", np.nan)])
def test_what_is_no_number_stays_in_its_own_sequence(
    name: str, number: float, format: str, dtype: str, isa: str, make_model: MakeModel
) -> None:
    config, weights = MODELS[name]
    embedding = weights["model.embed_tokens.weight"].copy()
    embedding[SPOILT_TOKEN, 7] = number
    weights = weights | {"model.embed_tokens.weight": embedding}
    model = make_model(isa, config, weights, format, block_size=5, num_blocks=70, dtype=dtype)
    chunk = random_chunks(1, 7, 24)
    healthy = model.run(SEQUENCES, chunk)
    spoilt = [*SEQUENCES[5][:20], SPOILT_TOKEN, *SEQUENCES[5][20:45]]
    logits = model.run({3: SEQUENCES[3], 7: spoilt, 1: SEQUENCES[1]}, lambda row: 10, seed=1)
    assert_same(logits | {7: healthy[5]}, healthy | {7: healthy[5]}, "beside it")
    assert np.array_equal(logits[7][:20], healthy[5][:20])
    assert not np.isfinite(logits[7][20:]).any()
    for seed in range(2):  # most of the blocks are those of the spoilt one now
        assert_same(model.run(SEQUENCES, chunk, seed), healthy, "after it")
