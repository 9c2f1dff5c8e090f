"""When what happened to a request, from real engines."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from asyncscale import AsyncScaleClient, SimulatedModel
from asyncscale.client.completion import Timing

MODEL = SimulatedModel(base_ms=2, decode_us=1, prefill_us=10)


def in_order(timing: Timing) -> None:
    """Each moment after the one before it; durations fit between them."""
    queued, first, last = timing.queued, timing.first_token, timing.last_token
    assert queued is not None
    assert first is not None
    assert last is not None
    assert timing.prefill_s is not None
    assert timing.arrival <= queued <= queued + timing.queued_s + timing.prefill_s <= first <= last
    assert timing.held_s == queued - timing.arrival
    assert timing.ttft == first - timing.arrival
    assert timing.decode_s == last - first
    assert timing.e2e == last - timing.arrival


async def test_times_of_a_request_that_nothing_happens_to() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        timing = (await client.generate("hello", max_tokens=5, ignore_eos=True)).timing
    in_order(timing)
    assert timing.prefill_s is not None
    assert timing.prefill_s >= 0.002  # a step of the model
    assert timing.tpot is not None
    assert timing.decode_s == pytest.approx(4 * timing.tpot)
    assert (timing.num_preemptions, timing.num_moves) == (0, 0)


async def test_a_request_that_is_held_back_counts_that_as_held() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, max_num_seqs=1) as client:
        first = client.generate("hello", max_tokens=20, ignore_eos=True)
        second = client.generate("hello", max_tokens=2, ignore_eos=True)
        assert second.timing.queued is None
        assert second.timing.held_s is None
        one, two = (await first).timing, (await second).timing
    in_order(two)
    assert one.last_token is not None
    assert two.queued is not None
    assert two.queued >= one.last_token


async def test_a_request_that_waits_at_its_engine_counts_that_as_queued() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, max_num_seqs=1) as client:
        first = client.generate("hello", max_tokens=20, ignore_eos=True, engine=0)
        second = client.generate("hello", max_tokens=2, ignore_eos=True, engine=0)  # pinned: not held back here
        one, two = (await first).timing, (await second).timing
    in_order(two)
    assert one.decode_s is not None
    assert two.queued_s >= 18 * 0.002  # nearly all steps of the first one
    assert two.queued_s > one.queued_s


async def test_times_of_several_choices() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        completion = await client.generate("x" * 40, n=3, max_tokens=30, temperature=1.0, seed=3)
    timing = completion.timing
    in_order(timing)
    lengths = [len(choice.token_ids) for choice in completion.choices]
    assert (timing.num_output_tokens, timing.longest_output) == (sum(lengths), max(lengths))
    assert timing.num_cached_tokens == 0  # of the first choice, which computed the prompt for the others
    assert timing.tpot is not None
    assert timing.decode_s == pytest.approx((max(lengths) - 1) * timing.tpot)


async def test_times_of_preempted_requests() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, num_kv_blocks=12, max_model_len=128) as client:
        generations = [client.generate("hello", max_tokens=80, ignore_eos=True) for _ in range(4)]
        timings = [(await generation).timing for generation in generations]
    assert sum(timing.num_preemptions for timing in timings) > 0
    for timing in timings:
        in_order(timing)


async def test_a_moved_request_keeps_the_times_of_its_first_token() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2) as client:
        pids = [info["pid"] for info in await client.collective_rpc("process_info")]
        generation = client.generate("x" * 40, max_tokens=200, ignore_eos=True)
        tokens = aiter(generation)
        await anext(tokens)
        before = generation.timing
        assert before.engine is not None
        os.kill(pids[before.engine], signal.SIGKILL)
        timing = (await generation).timing
    in_order(timing)
    assert (timing.num_moves, timing.engine) == (1, 1 - before.engine)
    kept = ("arrival", "queued", "queued_s", "prefill_s", "first_token", "num_cached_tokens")
    assert [getattr(timing, name) for name in kept] == [getattr(before, name) for name in kept]


async def test_times_so_far_of_a_request_that_runs() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        generation = client.generate("hello", max_tokens=1000, ignore_eos=True)
        at_first = generation.timing
        assert (at_first.first_token, at_first.ttft, at_first.e2e, at_first.tpot, at_first.prefill_s) == (None,) * 5
        async with asyncio.timeout(10):
            tokens = aiter(generation)
            for _ in range(3):
                await anext(tokens)
        in_order(generation.timing)
        assert generation.timing.num_output_tokens == generation.num_tokens
        generation.abort()
        in_order(generation.timing)
