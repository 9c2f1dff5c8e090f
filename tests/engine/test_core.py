"""The engine core as its clients see it: refusals, endings, choices, departures, counts."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest

from asyncscale import messages
from asyncscale.engine.core import EngineCore
from asyncscale.params import Sampling

A, B = b"a", b"b"
PROMPT = list(range(10))


# --- endings


def test_a_stop_token_ends_a_request_and_is_its_last_token(make_engine, run_solo):
    engine = make_engine()
    engine.add(0, PROMPT, max_tokens=200, temperature=1.0, seed=1)
    engine.run()
    expected, reason, _ = run_solo(PROMPT, max_tokens=200, temperature=1.0, seed=1)
    assert reason == "stop"
    assert engine.tokens(0) == expected
    assert (engine.finished(0).reason, engine.finished(0).stop_token_id) == ("stop", 256)
    assert expected.index(256) == len(expected) - 1


def test_only_the_request_that_asked_for_it_stops_at_a_token(make_engine, run_solo, endless):
    token_ids = run_solo(PROMPT, max_tokens=20, **endless)[0]
    stop = token_ids[7]
    engine = make_engine()
    engine.add(0, PROMPT, max_tokens=20, **endless)
    engine.add(1, PROMPT, max_tokens=20, **{**endless, "stop_token_ids": (stop,)})
    engine.run()
    assert (engine.tokens(0), engine.finished(0).reason) == (token_ids, "length")
    assert (engine.tokens(1), engine.finished(1).stop_token_id) == (token_ids[: token_ids.index(stop) + 1], stop)


def test_a_runners_stop_token_before_min_tokens_does_not_end_a_request(make_engine):
    engine = make_engine()
    engine.runner._replace_early_stops = lambda rows, positions, token_ids: {}  # a runner that bans nothing
    engine.runner._tokens = lambda keys, positions: np.full(len(positions), 256, np.int32)
    engine.add(0, PROMPT, min_tokens=3)
    engine.run()
    assert (engine.tokens(0), engine.finished(0).reason) == ([256] * 4, "stop")


@pytest.mark.parametrize(("max_tokens", "generated"), [(1, 1), (7, 7), (100, 22), (2**70, 22)])
def test_the_end_is_max_tokens_or_the_end_of_the_context(make_engine, endless, max_tokens, generated):
    engine = make_engine(max_model_len=32)
    engine.add(0, PROMPT, max_tokens=max_tokens, **endless)
    engine.run()
    assert len(engine.tokens(0)) == generated
    assert (engine.finished(0).reason, engine.finished(0).stop_token_id) == ("length", None)


def test_the_runners_error_for_a_row_ends_that_request_alone(make_engine, run_solo, endless):
    engine = make_engine()
    for request_id in range(3):
        engine.add(request_id, [*PROMPT, request_id], max_tokens=6, **endless)
    engine.step()
    engine.runner.failures[A, 1] = "not a number"
    engine.run()
    assert (engine.finished(1).reason, engine.finished(1).error) == ("error", "not a number")
    for request_id, length in enumerate([6, 1, 6]):
        assert engine.tokens(request_id) == run_solo([*PROMPT, request_id], max_tokens=6, **endless)[0][:length]


def test_what_a_failed_step_computed_is_not_reused(make_engine, endless):
    engine = make_engine()
    engine.add(0, PROMPT, **endless)
    engine.runner.failures[A, 0] = "broken"
    engine.run()
    assert engine.core.kv_cache_stats()["cached_blocks"] == 0


def test_what_execute_raises_is_not_swallowed(make_engine):
    engine = make_engine()

    def fail() -> None:
        raise MemoryError("the device is gone")

    engine.runner.before_execute = fail
    engine.add(0, PROMPT)
    with pytest.raises(MemoryError):
        engine.step()


def test_times_are_counted_from_arrival(make_engine, endless):
    engine = make_engine(max_num_seqs=1)
    engine.add(0, PROMPT, max_tokens=3, **endless)  # arrives at 1
    engine.add(1, PROMPT, max_tokens=3, **endless)  # at 2; the first step begins at 3, its token comes at 4
    engine.run()
    first, second = engine.started(0), engine.started(1)
    assert (first.queued_s, first.prefill_s) == (2.0, 1.0)
    assert second.queued_s > first.queued_s + first.prefill_s
    assert second.prefill_s == 1


# --- resumed requests


def test_a_resumed_request_goes_on_as_if_it_had_never_moved(make_engine, run_solo):
    fields = {"max_tokens": 30, "min_tokens": 25, "temperature": 1.0, "seed": 5}
    expected, reason, _ = run_solo(PROMPT, **fields)
    engine = make_engine()
    engine.add(0, PROMPT, given=expected[:12], **fields)
    engine.run()
    assert engine.tokens(0) == expected[12:]
    assert engine.finished(0).reason == reason


def test_a_resumed_request_that_was_complete_ends_at_once(make_engine, endless):
    engine = make_engine()
    engine.add(0, PROMPT, given=[300, 301], max_tokens=2, **endless)
    engine.run()
    assert (engine.tokens(0), engine.finished(0).reason) == ([], "length")


# --- refusals


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1, 1000]}, r"token_ids must hold token ids in \[0, 1000\), got 1000"),
        ({"prompt": [-1]}, "got -1"),
        ({"prompt": [1] * 257}, "a prompt of 257 tokens is longer than the model's context of 256"),
        ({"prompt": [1] * 256}, "256 tokens leave no room for output in the model's context of 256"),
        ({"n": 0}, r"n must be in \[1, 1024\], got 0"),
        ({"n": 10**12}, "n must be in"),
        ({"request_id": -1}, "request_id must be in"),
        ({"request_id": 2**63 - 1}, "request_id must be in"),
        ({"priority": 2**64}, "priority must be a 64-bit integer"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"min_tokens": -1}, "min_tokens must be in"),
        ({"stop_token_ids": (5, 1000)}, "stop_token_ids must hold token ids"),
        ({"logit_bias": ((1000, 1.0),)}, "logit_bias must hold token ids"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias must hold finite numbers"),
        ({"bad_words_token_ids": ((1, -2),)}, "bad_words_token_ids must hold token ids"),
        ({"bad_words_token_ids": ((),)}, "empty word"),
        ({"temperature": float("nan")}, "temperature must be in"),
        ({"temperature": float("inf")}, "temperature must be in"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"min_p": 1.5}, "min_p must be in"),
        ({"top_k": -1}, "top_k must be in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be in"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be in"),
        ({"logprobs": 1001}, r"logprobs must be in \[0, 1000\], got 1001"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be in"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_to_its_client_and_harms_nobody(make_engine, run_solo, fields, words):
    engine = make_engine()
    engine.add(0, PROMPT, client=B)
    request = {"request_id": 1, "prompt": PROMPT, **fields}
    add = {name: request.pop(name) for name in ("request_id", "n", "priority") if name in request}
    token_ids = np.array(request.pop("prompt"), "<i4")
    sampling = Sampling(**{"max_tokens": 4, **request})
    engine.core.add(
        A, messages.Add(token_ids=token_ids.tobytes(), num_prompt_tokens=len(token_ids), sampling=sampling, **add)
    )
    outputs = engine.core.step()
    [finished] = outputs[A].finished
    assert (finished.request_id, finished.reason) == (add["request_id"], "error")
    assert re.search(words, finished.error)
    assert len(outputs[B].token_ids) == 1
    assert engine.core.by_client() == {B: (1, 0)}


@pytest.mark.parametrize(
    ("token_ids", "num_prompt_tokens", "words"),
    [
        (bytes(7), 1, "4 bytes per token, got 7 bytes"),
        (bytes(8), 0, r"num_prompt_tokens must be in \[1, 2\], got 0"),
        (bytes(8), 3, r"num_prompt_tokens must be in \[1, 2\], got 3"),
        (bytes(4 * 257), 10, "257 tokens leave no room"),
    ],
)
def test_a_message_that_contradicts_itself_is_refused(make_engine, token_ids, num_prompt_tokens, words):
    engine = make_engine()
    engine.core.add(A, messages.Add(0, token_ids, num_prompt_tokens, Sampling(max_tokens=4)))
    [finished] = engine.core.step()[A].finished
    assert re.search(words, finished.error)


def test_a_prompt_that_the_cache_can_never_hold_is_refused_with_both_numbers(make_engine):
    engine = make_engine(num_kv_blocks=5, block_size=4)
    engine.add(0, [1] * 21)
    engine.run()
    assert engine.finished(0).error == "21 tokens need 6 KV-cache blocks, and this engine has 5 in all"
    assert engine.runner.batches == []


def test_each_choice_of_a_refused_request_is_told(make_engine):
    engine = make_engine()
    engine.add(4, [5000], n=3)
    assert engine.core.has_work
    engine.run()
    assert [engine.finished(request_id).reason for request_id in (4, 5, 6)] == ["error"] * 3


def test_an_id_that_is_alive_is_refused_for_its_client_but_not_for_another(make_engine, run_solo, endless):
    engine = make_engine()
    engine.add(0, PROMPT, client=A, n=2, max_tokens=5, **endless)
    engine.add(1, [*PROMPT, 1], client=B, max_tokens=5, **endless)
    engine.core.add(A, messages.Add(1, bytes(4), 1, Sampling(max_tokens=4)))
    outputs = engine.core.step()
    [finished] = outputs[A].finished
    assert (finished.reason, finished.error) == ("error", "request id 1 is already in use")
    assert outputs[B].finished == []
    assert engine.core.by_client() == {A: (2, 0), B: (1, 0)}


# --- choices


def test_choices_are_drawn_with_consecutive_seeds_and_share_the_prompts_blocks(make_engine, run_solo):
    fields = {"max_tokens": 12, "temperature": 1.0, "seed": 2**64 - 2}
    engine = make_engine()
    engine.add(10, PROMPT, n=4, **fields)
    engine.run()
    for choice in range(4):
        assert engine.tokens(10 + choice) == run_solo(PROMPT, choice=choice, **fields)[0]
        assert engine.started(10 + choice).num_cached_tokens == (8 if choice else 0)
    assert len({tuple(engine.tokens(10 + choice)) for choice in range(4)}) == 4


def test_further_choices_wait_until_the_prompt_is_computed(make_engine):
    engine = make_engine(max_num_batched_tokens=8)
    engine.add(0, list(range(20)), n=3)
    for _ in range(3):
        engine.step()
        assert engine.core.load(A).waiting == 2
    engine.step()
    assert engine.core.load(A).running == 3


@pytest.mark.parametrize("aborted", [[0], [0, 1], [1], [0, 2], [2, 1]])
def test_choices_survive_when_others_are_aborted_before_the_prompt_is_computed(make_engine, run_solo, aborted):
    fields = {"max_tokens": 6, "temperature": 1.0, "seed": 3}
    engine = make_engine(max_num_batched_tokens=8)
    engine.add(0, list(range(20)), n=4, **fields)
    engine.step()
    engine.core.abort(A, aborted)
    engine.run()
    for choice in range(4):
        expected = [] if choice in aborted else run_solo(list(range(20)), choice=choice, **fields)[0]
        assert engine.tokens(choice) == expected
    assert engine.core.by_client() == {}


def test_the_other_choices_go_on_when_the_first_ones_row_fails(make_engine):
    engine = make_engine()
    engine.add(0, PROMPT, n=3, max_tokens=4)
    engine.runner.failures[A, 0] = "broken"
    engine.run()
    assert [engine.finished(choice).reason == "error" for choice in range(3)] == [True, False, False]


def test_a_first_choice_of_one_token_leaves_the_others_queued(make_engine, endless):
    engine = make_engine()
    engine.add(0, PROMPT, n=3, max_tokens=1, **endless)
    engine.run()
    assert [len(engine.tokens(choice)) for choice in range(3)] == [1, 1, 1]


# --- log-probabilities


def test_logprobs_go_with_their_tokens_to_those_who_asked(make_engine, endless):
    engine = make_engine()
    engine.add(0, PROMPT, client=A, max_tokens=5, **endless)
    engine.add(1, PROMPT, client=A, max_tokens=5, logprobs=2, **endless)
    engine.add(0, PROMPT, client=B, max_tokens=5, logprobs=0, **endless)
    engine.run()
    assert engine.received[A, 0].logprobs == []
    for key, length in (((A, 1), 3), ((B, 0), 1)):
        received = engine.received[key]
        assert [entry.token_ids[0] for entry in received.logprobs] == received.token_ids
        assert {len(entry.logprobs) for entry in received.logprobs} == {length}


def test_prompt_logprobs_come_in_chunks_and_in_order(make_engine, endless):
    engine = make_engine(max_num_batched_tokens=8)
    engine.add(0, list(range(30)), max_tokens=2, **endless)
    engine.run()
    engine.add(1, list(range(30)), max_tokens=2, prompt_logprobs=1, **endless)
    engine.step()
    assert len(engine.received[A, 1].prompt_logprobs) == 8
    engine.run()
    assert [entry.token_ids[0] for entry in engine.received[A, 1].prompt_logprobs] == list(range(1, 30))
    assert engine.started(1).num_cached_tokens == 0  # every position's logits had to be computed


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_no_prompt_position_comes_twice_after_a_preemption(make_engine, endless, num_steps):
    engine = make_engine(max_num_seqs=1, max_num_batched_tokens=8)
    engine.add(0, list(range(30)), priority=1, max_tokens=6, prompt_logprobs=0, **endless)
    for _ in range(num_steps):
        engine.step()
    engine.add(1, PROMPT, priority=0, max_tokens=1)
    engine.run()
    assert engine.num_preemptions(0) == 1
    assert [entry.token_ids[0] for entry in engine.received[A, 0].prompt_logprobs] == list(range(1, 30))


# --- aborts, departures, counts


def test_an_abort_says_nothing_and_frees_everything(make_engine, endless):
    engine = make_engine(max_num_seqs=2)
    for request_id in range(4):
        engine.add(request_id, [*PROMPT, request_id], max_tokens=50, **endless)
    engine.step()
    engine.core.abort(A, [0, 3, 3, 77])
    assert engine.core.by_client() == {A: (2, 0)}
    engine.core.abort(A, [1, 2])
    assert not engine.core.has_work
    assert engine.core.step() == {}
    assert engine.core.load(A) == messages.Load(engine.core.load_version, 0, 0, 0, 0, 0, 0, 200, share=2)


def test_a_late_abort_and_one_by_another_client_change_nothing(make_engine, endless):
    engine = make_engine()
    engine.add(0, PROMPT, client=A, max_tokens=3, **endless)
    engine.add(0, PROMPT, client=B, max_tokens=5, **endless)
    for _ in range(3):
        engine.step()
    version = engine.core.load_version
    engine.core.abort(A, [0])
    engine.core.abort(b"stranger", [0])
    assert engine.core.load_version == version
    engine.run()
    assert len(engine.tokens(0, B)) == 5


def test_two_clients_with_the_same_ids_get_their_own_tokens(make_engine, run_solo, endless):
    engine = make_engine()
    for client, seed in ((A, 1), (B, 2), (b"c", 3)):
        for request_id in range(2):
            engine.add(request_id, [*PROMPT, request_id], client=client, seed=seed, max_tokens=7, **endless)
    engine.run()
    for client, seed in ((A, 1), (B, 2), (b"c", 3)):
        for request_id in range(2):
            assert engine.tokens(request_id, client) == run_solo(
                [*PROMPT, request_id], seed=seed, max_tokens=7, **endless
            )[0]  # fmt: skip


def test_a_dropped_client_leaves_nothing_behind_and_may_come_back(make_engine, run_solo, endless):
    engine = make_engine(max_num_seqs=2)
    for request_id in range(3):
        engine.add(request_id, PROMPT, client=A, n=1 + request_id, max_tokens=9, **endless)
        engine.add(request_id, PROMPT, client=B, max_tokens=9, **endless)
    engine.add(50, [5000], client=A)
    engine.step()
    engine.add(51, [5000], client=A)
    engine.core.drop_client(A)
    assert engine.core.by_client() == {B: (3, 0)}
    received = len(engine.received[A, 0].token_ids)
    for _ in range(3):
        engine.step()
    assert engine.received[A, 51].finished is None
    assert len(engine.received[A, 0].token_ids) == received
    engine.add(60, PROMPT, client=A, max_tokens=9, **endless)
    engine.run()
    assert engine.tokens(60) == engine.tokens(2, B) == run_solo(PROMPT, max_tokens=9, **endless)[0]


def test_each_client_is_told_the_totals_and_its_own_share(make_engine, endless):
    engine = make_engine(max_num_seqs=3, block_size=4)
    engine.add(0, PROMPT, client=A, n=2, max_tokens=9, weight=100, **endless)
    for request_id in range(3):
        engine.add(request_id, PROMPT, client=B, max_tokens=9, weight=7, **endless)
    engine.step()
    assert engine.loads[A] == messages.Load(engine.core.load_version, 3, 2, 2, 221, 200, 9, 200, share=1)
    assert engine.loads[B] == messages.Load(engine.core.load_version, 3, 2, 3, 221, 21, 9, 200, share=1)
    assert engine.core.by_client() == {A: (2, 200), B: (3, 21)}
    engine.run()
    assert engine.core.load(A).tokens == 0


def test_the_load_version_changes_with_every_count_and_with_nothing_else(make_engine, endless):
    engine = make_engine(max_num_seqs=1)
    seen = [engine.core.load_version]

    def changed() -> bool:
        seen.append(engine.core.load_version)
        return seen[-1] != seen[-2]

    engine.add(0, PROMPT, max_tokens=4, **endless)
    assert changed()
    engine.step()  # from waiting to running
    assert changed()
    engine.step()
    assert not changed()
    engine.add(1, PROMPT, **endless)
    assert changed()
    engine.core.abort(A, [1])
    assert changed()
    engine.step()
    assert not changed()
    engine.step()  # its last token
    assert changed()


def test_outputs_survive_the_wire(make_engine):
    engine = make_engine()
    engine.add(0, PROMPT, n=2, logprobs=1, prompt_logprobs=1, max_tokens=2)
    while engine.core.has_work:
        [outputs] = engine.core.step().values()
        assert messages.from_engine_decoder.decode(msgspec.msgpack.encode(outputs)) == outputs


def test_a_runner_whose_keys_depend_on_more_than_earlier_tokens_shares_no_prefixes(make_engine):
    hits = []
    for supported in (True, False):
        engine = make_engine(block_size=4)
        engine.runner.supports_prefix_caching = supported
        engine.core = EngineCore(engine.runner, engine.config)
        for request_id in range(2):
            engine.add(request_id, range(20))
            engine.run()
        hits.append(engine.started(1).num_cached_tokens)
    assert hits == [16, 0]


def test_prompt_logprobs_come_once_for_all_choices_and_the_others_share_the_prompt(make_engine, endless):
    engine = make_engine(block_size=4)
    engine.add(0, PROMPT, n=3, prompt_logprobs=1, max_tokens=2, **endless)
    engine.run()
    assert [len(engine.received[A, i].prompt_logprobs) for i in range(3)] == [len(PROMPT) - 1, 0, 0]
    assert [engine.started(i).num_cached_tokens for i in range(3)] == [0, 8, 8]
