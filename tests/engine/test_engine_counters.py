"""What an engine counts, against what its clients got and its steps computed."""

from __future__ import annotations

from asyncscale.metrics.catalog import ENGINE_LAYOUT, EngineMetrics

A, B = b"a", b"b"
PROMPT = list(range(10))


def counted(engine) -> EngineMetrics:
    return ENGINE_LAYOUT.read(engine.core._counters._cells)


def test_tokens_are_those_that_were_sent_and_made(make_engine, endless):
    engine = make_engine(max_num_batched_tokens=16)  # prompts are computed in chunks
    for number in range(12):
        engine.add(number, [number, *range(29)], client=A if number % 2 else B, max_tokens=5, **endless)
    engine.run()
    seen = counted(engine)
    assert (seen.prompt_tokens, seen.generation_tokens) == (12 * 30, 12 * 5)
    assert seen.iteration_tokens_total.count == len(engine.runner.batches)
    assert seen.iteration_tokens_total.sum == sum(count for batch in engine.runner.batches for _, count in batch)
    assert (seen.num_requests_running, seen.num_requests_waiting, seen.kv_cache_usage_perc) == (0, 0, 0.0)


def test_gauges_are_those_of_the_load_report_at_every_moment(make_engine, endless):
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=32)

    def check():
        load, seen = engine.core.load(A), counted(engine)
        assert (seen.num_requests_running, seen.num_requests_waiting) == (load.running, load.waiting)
        assert abs(seen.kv_cache_usage_perc - load.used_blocks / load.num_blocks) < 1e-5

    for number in range(5):
        engine.add(number, PROMPT, max_tokens=20, **endless)
        check()
    engine.step()
    check()
    engine.core.abort(A, [0, 4])
    check()
    while engine.core.has_work:
        engine.step()
        check()


def test_a_sequence_that_is_preempted_counts_its_prompt_once(make_engine, endless):
    engine = make_engine(num_kv_blocks=10, max_num_seqs=4)
    for number in range(3):
        engine.add(number, PROMPT, max_tokens=20, **endless)
    engine.run()
    preemptions = sum(engine.num_preemptions(number) for number in range(3))
    assert preemptions > 0
    seen = counted(engine)
    assert (seen.num_preemptions, seen.prompt_tokens, seen.generation_tokens) == (preemptions, 30, 60)


def test_each_choice_is_a_sequence_and_the_cache_is_counted(make_engine, endless):
    engine = make_engine()
    engine.add(0, PROMPT, n=3, max_tokens=4, **endless)
    engine.run()
    seen, stats = counted(engine), engine.core.kv_cache_stats()
    assert (seen.prompt_tokens, seen.generation_tokens) == (30, 12)
    assert (seen.prefix_cache_queries, seen.prefix_cache_hits) == (stats["prefix_queries"], stats["prefix_hits"])
    assert seen.cache_hit_rate == 16 / 30


def test_guesses_are_counted(make_engine):
    from asyncscale.config import SimulatedModel

    engine = make_engine(model=SimulatedModel(output_period=4), speculation="ngram")
    engine.add(0, PROMPT, max_tokens=50, stop_token_ids=())
    engine.run()
    seen, stats = counted(engine), engine.core.speculation_stats()
    assert seen.spec_decode_num_draft_tokens == stats["drafted_tokens"] > 0
    assert seen.spec_decode_num_accepted_tokens == stats["accepted_tokens"] > 0
    assert seen.generation_tokens == 50
    assert seen.iteration_tokens_total.sum == 10 + 49 + stats["drafted_tokens"] - stats["accepted_tokens"]
