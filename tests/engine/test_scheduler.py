"""What each step's batch holds, seen from the runner, and whom preemption hits."""

from __future__ import annotations

import pytest

A, B = b"a", b"b"


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + index) % 256 for index in range(length)]


def test_a_long_prompt_is_computed_in_chunks_beside_the_decodes(make_engine, endless):
    engine = make_engine(max_num_batched_tokens=10)
    engine.add(0, prompt(4), max_tokens=20, **endless)
    engine.step()
    engine.add(1, prompt(25, 100), max_tokens=3, **endless)
    engine.run()
    assert engine.runner.batches[:5] == [
        [((A, 0), 4)],
        [((A, 0), 1), ((A, 1), 9)],
        [((A, 0), 1), ((A, 1), 9)],
        [((A, 0), 1), ((A, 1), 7)],
        [((A, 0), 1), ((A, 1), 1)],
    ]


def test_no_more_requests_are_admitted_than_the_budget_reaches(make_engine, endless):
    engine = make_engine(max_num_batched_tokens=32)
    for request_id in range(4):
        engine.add(request_id, prompt(30, request_id), **endless)
    engine.step()
    assert engine.runner.batches == [[((A, 0), 30), ((A, 1), 2)]]
    load = engine.core.load(A)
    assert (load.running, load.waiting, load.used_blocks) == (2, 2, 16)


def test_a_budget_smaller_than_every_prompt_still_serves_all(make_engine, run_solo, endless):
    engine = make_engine(max_num_batched_tokens=2, max_num_seqs=2)
    for request_id in range(4):
        engine.add(request_id, prompt(9, request_id), max_tokens=5, **endless)
    engine.run()
    for request_id in range(4):
        assert engine.tokens(request_id) == run_solo(prompt(9, request_id), max_tokens=5, **endless)[0]


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_tokens_do_not_depend_on_the_block_size(make_engine, run_solo, block_size, prefix_caching):
    engine = make_engine(block_size=block_size, enable_prefix_caching=prefix_caching)
    for request_id in range(6):
        engine.add(request_id, prompt(20 + request_id % 2), max_tokens=30, temperature=1.0, seed=request_id // 3)
    engine.run()
    for request_id in range(6):
        expected = run_solo(prompt(20 + request_id % 2), max_tokens=30, temperature=1.0, seed=request_id // 3)
        assert engine.tokens(request_id) == expected[0]


def test_waiting_requests_start_by_priority_then_arrival(make_engine):
    engine = make_engine(max_num_seqs=1)
    for request_id, priority in enumerate([0, 5, -3, 0, -3]):
        engine.add(request_id, prompt(4, request_id), priority=priority, max_tokens=2)
    engine.run()
    starts = [batch[0][0][1] for batch in engine.runner.batches if batch[0][1] > 1]
    assert starts == [2, 4, 0, 3, 1]


def test_a_better_priority_takes_the_row_of_a_worse_one(make_engine, run_solo, endless):
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=2)
    engine.add(0, prompt(1), priority=1, max_tokens=12, **endless)
    engine.add(1, prompt(1, 5), priority=2, max_tokens=12, **endless)
    engine.step()
    engine.step()
    engine.add(2, prompt(1, 9), priority=0, max_tokens=3, **endless)
    engine.step()
    assert engine.runner.batches[-1] == [((A, 0), 1), ((A, 2), 1)]
    engine.run()
    assert [engine.num_preemptions(request_id) for request_id in range(3)] == [0, 1, 0]
    for request_id, start in enumerate([0, 5]):
        assert engine.tokens(request_id) == run_solo(prompt(1, start), max_tokens=12, **endless)[0]


def test_an_equal_priority_waits_for_its_turn(make_engine, endless):
    engine = make_engine(max_num_seqs=1)
    engine.add(0, prompt(4), max_tokens=12, **endless)
    engine.step()
    engine.add(1, prompt(4, 9), max_tokens=3, **endless)
    engine.run()
    assert [engine.num_preemptions(request_id) for request_id in range(2)] == [0, 0]
    first = engine.started(0)
    assert engine.started(1).queued_s > first.queued_s + first.prefill_s


def test_when_blocks_run_out_the_latest_arrival_is_preempted_and_continues_exactly(make_engine, run_solo, endless):
    engine = make_engine(block_size=4, num_kv_blocks=10, max_model_len=40)
    engine.add(0, prompt(8), max_tokens=24, **endless)
    engine.add(1, prompt(8, 50), max_tokens=24, **endless)
    engine.run()
    assert [engine.num_preemptions(request_id) for request_id in range(2)] == [0, 1]
    for request_id, start in enumerate([0, 50]):
        expected, reason, _ = run_solo(prompt(8, start), max_tokens=24, max_model_len=40, **endless)
        assert (engine.tokens(request_id), engine.finished(request_id).reason) == (expected, reason)


def test_when_blocks_run_out_the_worst_priority_is_preempted_although_it_came_first(make_engine, endless):
    engine = make_engine(block_size=4, num_kv_blocks=10, max_model_len=40)
    engine.add(0, prompt(8), priority=1, max_tokens=24, **endless)
    engine.add(1, prompt(8, 50), priority=0, max_tokens=24, **endless)
    engine.run()
    assert [engine.num_preemptions(request_id) for request_id in range(2)] == [1, 0]


def test_while_two_clients_wait_the_slots_that_turn_over_are_theirs_in_equal_parts(make_engine, endless):
    engine = make_engine(num_kv_blocks=400)
    for request_id in range(200):
        engine.add(request_id, prompt(4), max_tokens=3 + request_id % 7, **endless)
    for _ in range(5):
        engine.step()
    for request_id in range(60):
        engine.add(request_id, prompt(4, 100), client=B, max_tokens=3 + request_id % 5, **endless)
    for _ in range(10):  # longer than any that ran when B came
        engine.step()
    for _ in range(30):
        engine.step()
        running = [client for (client, _), _ in engine.runner.batches[-1]]
        assert abs(running.count(A) - running.count(B)) <= 1


def test_when_blocks_run_out_the_client_with_the_most_running_gives_up_its_latest(make_engine, endless):
    engine = make_engine(num_kv_blocks=12, enable_prefix_caching=False)
    for request_id in range(2):
        engine.add(request_id, prompt(12), max_tokens=30, **endless)
    engine.add(0, prompt(12), client=B, max_tokens=30, **endless)
    engine.step()
    while engine.core.load(A).waiting == 0:
        engine.step()
    assert {key for key, _ in engine.runner.batches[-1]} == {(A, 0), (B, 0)}
    engine.run()


def test_a_flood_that_came_first_does_not_take_the_blocks_of_who_comes_later(make_engine, endless):
    """Blocks for four requests, and rows for sixteen: one is preempted every few steps."""
    engine = make_engine(num_kv_blocks=44, max_num_seqs=16, enable_prefix_caching=False)
    for request_id in range(300):
        engine.add(request_id, prompt(4), max_tokens=40, **endless)
    for _ in range(30):
        engine.step()
    for request_id in range(20):
        engine.add(request_id, prompt(4, 100), client=B, max_tokens=40, **endless)
    while any(engine.received[B, request_id].finished is None for request_id in range(20)):
        engine.step()
    flood_done = sum(engine.received[A, request_id].finished is not None for request_id in range(300))
    assert flood_done <= 40


def test_a_preempted_request_computes_only_what_the_prefix_cache_lost(make_engine, endless):
    engine = make_engine(max_num_seqs=1)
    engine.add(0, prompt(20), priority=1, max_tokens=10, **endless)
    for _ in range(5):
        engine.step()
    engine.add(1, prompt(4, 99), max_tokens=1, **endless)
    engine.run()
    # 20 + 4 generated tokens were computed, in 6 full blocks; without preemption 20 + 9 are computed in all
    assert engine.num_preemptions(0) == 1
    assert engine.num_computed(0) == 29


def test_a_preempted_request_returns_before_later_ones_of_its_class(make_engine, endless):
    engine = make_engine(max_num_seqs=1)
    engine.add(0, prompt(4), priority=1, max_tokens=8, **endless)
    engine.step()
    engine.add(1, prompt(4, 20), priority=1, max_tokens=2, **endless)
    engine.add(2, prompt(4, 40), priority=0, max_tokens=2, **endless)
    engine.run()
    order = [batch[0][0][1] for batch in engine.runner.batches]
    assert order == [0, 2, 2, *[0] * 7, 1, 1]


def test_a_request_that_outgrows_the_whole_cache_fails_with_both_numbers_and_no_other_suffers(
    make_engine, run_solo, endless
):
    engine = make_engine(block_size=4, num_kv_blocks=5, max_model_len=64)
    engine.add(0, prompt(8), max_tokens=40, **endless)
    engine.add(1, prompt(8, 50), max_tokens=8, **endless)
    engine.run()
    failed = engine.finished(0)
    assert failed.reason == "error"
    assert failed.error == "21 tokens need 6 KV-cache blocks, and this engine has 5 in all"
    expected = run_solo(prompt(8), max_tokens=40, **endless)[0]
    assert engine.tokens(0) == expected[:13]  # 20 positions hold 8 + 12 tokens; the 13th needs no position yet
    assert engine.tokens(1) == run_solo(prompt(8, 50), max_tokens=8, **endless)[0]


def test_a_shared_prefix_is_computed_once(make_engine, endless):
    engine = make_engine()
    engine.add(0, prompt(40), max_tokens=1, **endless)
    engine.run()
    engine.add(1, [*prompt(30), 255, 255], max_tokens=1, **endless)
    engine.run()
    assert engine.started(1).num_cached_tokens == 28
    assert engine.num_computed(1) == 4
    stats = engine.core.methods["kv_cache_stats"]()
    assert (stats["prefix_queries"], stats["prefix_hits"]) == (40 + 32, 28)


def test_the_last_token_is_computed_even_if_all_of_the_prompt_is_cached(make_engine, run_solo, endless):
    engine = make_engine()
    for request_id in range(2):
        engine.add(request_id, prompt(8), max_tokens=6, **endless)
        engine.run()
    assert engine.started(1).num_cached_tokens == 4
    assert engine.tokens(1) == run_solo(prompt(8), max_tokens=6, **endless)[0]


def test_generated_tokens_are_found_in_the_prefix_cache(make_engine, endless):
    engine = make_engine()
    engine.add(0, prompt(8), max_tokens=9, **endless)
    engine.run()
    engine.add(1, [*prompt(8), *engine.tokens(0), 3], max_tokens=1, **endless)
    engine.run()
    assert engine.started(1).num_cached_tokens == 16  # the ninth generated token was never computed


def test_blocks_of_a_prompt_that_was_aborted_half_way_are_found_only_as_far_as_computed(make_engine, run_solo, endless):
    engine = make_engine(max_num_batched_tokens=10)
    engine.add(0, prompt(40), **endless)
    engine.step()
    engine.core.abort(A, [0])
    engine.add(1, prompt(40), max_tokens=4, **endless)
    engine.run()
    assert engine.started(1).num_cached_tokens == 8
    assert engine.tokens(1) == run_solo(prompt(40), max_tokens=4, **endless)[0]


def test_without_prefix_caching_nothing_is_found(make_engine, endless):
    engine = make_engine(enable_prefix_caching=False)
    for request_id in range(2):
        engine.add(request_id, prompt(40), max_tokens=2, **endless)
        engine.run()
    assert engine.started(1).num_cached_tokens == 0
    assert engine.core.kv_cache_stats()["cached_blocks"] == 0


def test_a_reset_prefix_cache_finds_nothing_and_harms_no_running_request(make_engine, run_solo, endless):
    engine = make_engine()
    engine.add(0, prompt(40), max_tokens=10, **endless)
    for _ in range(4):
        engine.step()
    assert engine.core.methods["reset_prefix_cache"]() == 10
    engine.add(1, prompt(40), max_tokens=10, **endless)
    engine.run()
    assert engine.started(1).num_cached_tokens == 0
    assert engine.tokens(0) == engine.tokens(1) == run_solo(prompt(40), max_tokens=10, **endless)[0]
