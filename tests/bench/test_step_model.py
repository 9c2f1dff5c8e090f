"""Pauses between tokens against modelled steps, on runs made by hand and by a small simulation."""

from __future__ import annotations

import math
import random

import pytest

from asyncscale import SimulatedModel
from asyncscale.bench.step_model import Arrivals, step_time_ratio

MODEL = SimulatedModel(base_ms=8, decode_us=1000, prefill_us=10)


def simulate(requests: list[tuple[int, int, int]], slowdown: float = 1.0, jitter_s: float = 0.0) -> list[Arrivals]:
    """One engine. requests: (first step, prompt tokens, output tokens). Each token is read up to `jitter_s` late, those
    of one step always in the order of the requests."""
    rng = random.Random(1)
    now, step = 0.0, 0
    times: list[list[float]] = [[] for _ in requests]
    while any(len(got) < wanted for got, (_, _, wanted) in zip(times, requests, strict=True)):
        running = [i for i, (first, _, wanted) in enumerate(requests) if step >= first and len(times[i]) < wanted]
        num_decodes = sum(bool(times[i]) for i in running)
        num_prompt_tokens = sum(requests[i][1] for i in running if not times[i])
        now += slowdown * (8e-3 + 1e-3 * num_decodes + 10e-6 * num_prompt_tokens)
        for i, late in zip(running, sorted(rng.uniform(0, jitter_s) for _ in running), strict=True):
            times[i].append(now + late)
        step += 1
    return [Arrivals(prompt, got) for (_, prompt, _), got in zip(requests, times, strict=True)]


def test_one_request_alone_is_a_step_per_token() -> None:
    exact = [Arrivals(100, [0.5, 0.509, 0.518, 0.527])]
    assert step_time_ratio({0: exact}, MODEL) == pytest.approx(1)
    slower = [Arrivals(100, [0.5, 0.5108, 0.5216, 0.5324])]
    assert step_time_ratio({0: slower}, MODEL) == pytest.approx(1.2)


def test_another_prompt_in_the_step_counts_and_so_do_those_that_decode() -> None:
    first = Arrivals(50, [1.0, 1.0 + 8e-3 + 1e-3 + 300 * 10e-6, 1.0 + 2 * 8e-3 + 3e-3 + 300 * 10e-6])
    second = Arrivals(300, list(first.times_s[1:]))
    assert step_time_ratio({0: [first, second]}, MODEL) == pytest.approx(1)


@pytest.mark.parametrize("slowdown", [1.0, 1.05, 2.0])
def test_a_crowd_that_comes_and_goes_gives_the_slowdown_of_its_engine(slowdown: float) -> None:
    rng = random.Random(0)
    crowd = [(rng.randrange(200), rng.randrange(4, 400), rng.randrange(1, 100)) for _ in range(60)]
    assert step_time_ratio({0: simulate(crowd, slowdown)}, MODEL) == pytest.approx(slowdown)


def test_tokens_of_a_step_that_are_read_one_after_the_other_are_still_one_step() -> None:
    crowd = [(0, 20, 300)] * 40
    assert step_time_ratio({0: simulate(crowd, jitter_s=2e-3)}, MODEL) == pytest.approx(1, abs=0.01)


def test_engines_are_counted_apart() -> None:
    few, many = simulate([(0, 20, 50)] * 2), simulate([(0, 20, 50)] * 20)
    assert step_time_ratio({0: few, 1: many}, MODEL) == pytest.approx(1)
    assert step_time_ratio({0: few + many}, MODEL) < 0.95


def test_nothing_to_compare_is_no_number() -> None:
    assert math.isnan(step_time_ratio({}, MODEL))
    assert math.isnan(step_time_ratio({0: [Arrivals(5, [1.0])]}, MODEL))
