"""Guesses in the engine: the same tokens in fewer steps, and nobody else has less of budget or blocks for them."""

from __future__ import annotations

import math

import pytest

from asyncscale.config import EngineConfig, SimulatedModel
from asyncscale.engine.core import EngineCore
from asyncscale.model.simulation import SimulatedRunner

A = b"a"
COSTLESS = {"base_ms": 0, "decode_us": 0, "prefill_us": 0, "mean_output_tokens": 2**40}
PERIODIC = SimulatedModel(**COSTLESS, vocab_size=1000, output_period=5)
HALF_RIGHT = SimulatedModel(**COSTLESS, vocab_size=259)  # of two tokens
PROMPT = [1, 2, 3]


def drafted(engine):
    return engine.core.speculation_stats()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
@pytest.mark.parametrize("model", [PERIODIC, HALF_RIGHT])
def test_the_same_tokens_come_in_fewer_steps(make_engine, run_solo, model, sampling):
    engine = make_engine(model=model)
    engine.add(0, PROMPT, max_tokens=200, stop_token_ids=(), **sampling)
    engine.run()
    assert engine.tokens(0) == run_solo(PROMPT, model=model, max_tokens=200, stop_token_ids=(), **sampling)[0]
    assert engine.finished(0).reason == "length"
    stats = drafted(engine)
    assert engine.num_steps == 200 - stats["accepted_tokens"] < 150
    assert 0 < stats["accepted_tokens"] <= stats["drafted_tokens"]


def test_choices_are_each_what_they_are_alone(make_engine, run_solo, endless):
    engine = make_engine(model=HALF_RIGHT, speculation="ngram")
    engine.add(0, PROMPT, n=4, seed=2**64 - 2, max_tokens=60, **endless)
    engine.run()
    for choice in range(4):
        expected = run_solo(PROMPT, model=HALF_RIGHT, choice=choice, seed=2**64 - 2, max_tokens=60, **endless)
        assert engine.tokens(choice) == expected[0]
    assert drafted(engine)["accepted_tokens"] > 0


def test_a_stop_token_ends_a_request_in_the_middle_of_its_guesses(make_engine, run_solo):
    model = SimulatedModel(**{**COSTLESS, "mean_output_tokens": 30}, vocab_size=1000, output_period=3)
    engine = make_engine(model=model, speculation="ngram")
    for request_id in range(20):
        engine.add(request_id, [*PROMPT, request_id], max_tokens=200)
    engine.run()
    for request_id in range(20):
        expected, reason, stop_token_id = run_solo([*PROMPT, request_id], model=model, max_tokens=200)
        finished = engine.finished(request_id)
        assert (engine.tokens(request_id), finished.reason) == (expected, reason)
        assert finished.stop_token_id == stop_token_id
    assert drafted(engine)["drafted_tokens"] > drafted(engine)["accepted_tokens"] > 100


def test_several_tokens_of_a_request_are_in_one_message_in_order(make_engine, run_solo):
    engine = make_engine(model=PERIODIC, speculation="ngram", num_speculative_tokens=4)
    for request_id, client in enumerate([A, b"b", A]):
        engine.add(request_id, [*PROMPT, request_id], client=client, max_tokens=100, stop_token_ids=())
    for _ in range(10):
        engine.step()
    outputs = engine.core.step()
    assert outputs[A].request_ids == [0] * 5 + [2] * 5
    assert outputs[b"b"].request_ids == [1] * 5
    for message in outputs.values():
        expected: list[int] = []
        for request_id in sorted(set(message.request_ids)):
            so_far = len(engine.tokens(request_id, b"b" if request_id == 1 else A))
            text = run_solo([*PROMPT, request_id], model=PERIODIC, max_tokens=100, stop_token_ids=())[0]
            expected += text[so_far : so_far + 5]
        assert message.token_ids == expected


def test_blocks_of_wrong_guesses_are_given_back(make_engine):
    engine = make_engine(model=HALF_RIGHT, speculation="ngram", block_size=1)
    engine.add(0, PROMPT, max_tokens=100, stop_token_ids=())
    while engine.core.has_work:
        engine.step()
        num_computed = len(PROMPT) + len(engine.tokens(0)) - 1
        assert engine.core.load(A).used_blocks in (num_computed, 0)
    assert drafted(engine)["drafted_tokens"] > drafted(engine)["accepted_tokens"] > 0


def test_guesses_take_only_blocks_that_are_free(make_engine):
    engine = make_engine(model=PERIODIC, speculation="ngram", block_size=1, num_kv_blocks=100)
    engine.add(0, PROMPT, max_tokens=60, stop_token_ids=())
    engine.add(1, [*PROMPT, 4], max_tokens=33, stop_token_ids=())  # 62 + 36 blocks at their ends
    engine.run()
    assert drafted(engine)["accepted_tokens"] > 0
    assert [engine.num_preemptions(i) for i in range(2)] == [0, 0]


def test_a_pool_without_a_free_block_has_none_for_guesses(make_engine):
    engine = make_engine(model=PERIODIC, speculation="ngram", block_size=1, num_kv_blocks=32, max_model_len=32)
    engine.add(0, PROMPT, max_tokens=29, stop_token_ids=())
    for _ in range(9):
        engine.step()
    assert drafted(engine)["drafted_tokens"] > 0
    free = engine.core.kv_cache_stats()["free_blocks"]
    blocks = engine.core._scheduler.pool.allocate(free - 3)
    before = drafted(engine)["drafted_tokens"]
    engine.core.step()  # one for the token that is known, two for guesses
    assert drafted(engine)["drafted_tokens"] == before + 2
    engine.core._scheduler.pool.free(blocks)


def test_prompts_come_before_guesses(make_engine):
    engine = make_engine(model=PERIODIC, speculation="ngram", max_num_batched_tokens=20)
    engine.add(0, PROMPT, max_tokens=100, stop_token_ids=())
    for _ in range(8):
        engine.step()
    engine.add(1, list(range(16)), max_tokens=1)
    engine.step()
    assert engine.runner.batches[-1] == [((A, 0), 4), ((A, 1), 16)]
    engine.add(2, list(range(100, 130)), max_tokens=1)
    engine.step()
    assert engine.runner.batches[-1] == [((A, 0), 1), ((A, 2), 19)]


def test_a_row_that_fails_with_guesses_ends_alone(make_engine, run_solo):
    engine = make_engine(model=PERIODIC, speculation="ngram")
    for request_id in range(3):
        engine.add(request_id, [*PROMPT, request_id], max_tokens=100, stop_token_ids=())
    for _ in range(10):
        engine.step()
    engine.runner.failures[A, 1] = "not a number"
    engine.run()
    assert engine.finished(1).error == "not a number"
    for request_id in range(3):
        expected = run_solo([*PROMPT, request_id], model=PERIODIC, max_tokens=100, stop_token_ids=())[0]
        assert engine.tokens(request_id) == (expected if request_id != 1 else expected[: len(engine.tokens(1))])
    assert len(engine.tokens(1)) < 100


def test_what_guesses_computed_is_found_by_a_later_prompt_as_far_as_it_was_right(make_engine, run_solo):
    engine = make_engine(model=HALF_RIGHT, speculation="ngram")
    text = run_solo(PROMPT, model=HALF_RIGHT, max_tokens=60, stop_token_ids=())[0]
    engine.add(0, PROMPT, max_tokens=60, stop_token_ids=())
    engine.run()
    engine.add(1, [*PROMPT, *text], max_tokens=1)  # the runner audits that it reads its own keys
    engine.run()
    assert engine.started(1).num_cached_tokens == 60


def test_nothing_is_guessed_where_it_is_off_or_cannot_be_checked(make_engine, caplog):
    off = make_engine(model=PERIODIC, speculation="off")
    off.add(0, PROMPT, max_tokens=50, stop_token_ids=())
    off.run()
    assert (off.num_steps, drafted(off)) == (50, {"drafted_tokens": 0, "accepted_tokens": 0})
    for speculation in ("auto", "ngram"):
        config = EngineConfig(speculation=speculation, num_kv_blocks=10, max_model_len=64)
        runner = SimulatedRunner(PERIODIC, config)
        runner.token_cost = math.inf
        caplog.clear()
        core = EngineCore(runner, config)
        assert core._scheduler.drafter is None
        assert ("speculation" in caplog.text) == (speculation == "ngram")
