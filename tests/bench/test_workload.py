"""Workloads: repeatable, with the lengths and arrivals that they promise."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from scipy import stats

from asyncscale.bench.workload import corpus, file_requests, lognormal_requests

IDS = list(range(5000))


def lengths(requests):
    return np.array([(len(request.prompt), request.sampling["max_tokens"]) for request in requests])


def write_lines(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_requests_are_those_of_an_independent_recomputation():
    rng, expected, now = random.Random(7), [], 0.0
    for _ in range(50):
        num_in = min(1024, max(4, int(rng.lognormvariate(math.log(100) - 0.5, 1.0))))
        num_out = min(1024, max(4, int(rng.lognormvariate(math.log(50) - 0.32, 0.8))))
        at = rng.randrange(0, 5000 - num_in)
        expected.append((now, IDS[at : at + num_in], num_in, num_out))
        now += rng.expovariate(30.0)
    made = lognormal_requests(IDS, 50, rate=30.0, mean_in=100, mean_out=50, seed=7)
    assert [(r.arrival_s, r.prompt, r.num_prompt_tokens, r.sampling["max_tokens"]) for r in made] == expected


def test_first_requests_of_a_known_seed_stay_as_they_are():
    made = lognormal_requests(IDS, 3, rate=1.0, mean_in=220, mean_out=200, seed=0)
    assert lengths(made).tolist() == [[111, 149], [14, 92], [174, 55]]
    assert [round(request.arrival_s, 6) for request in made] == [0.0, 3.435789, 4.845574]


def test_the_same_seed_gives_the_same_requests_and_another_gives_others():
    first, second, other = (lognormal_requests(IDS, 20, 5.0, 100, 100, seed) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_lengths_are_lognormal_with_the_asked_means():
    made = lengths(lognormal_requests(IDS, 20_000, math.inf, 60, 40, seed=0))
    # Cutting at 4 and 1024 hardly moves means this small.
    np.testing.assert_allclose(made.mean(0), (60, 40), rtol=0.03)
    for column, mean, sigma in ((0, 60, 1.0), (1, 40, 0.8)):
        exact = stats.lognorm(sigma, scale=mean * math.exp(-(sigma**2) / 2))
        for length in (10, 30, 60, 200):
            assert abs((made[:, column] < length).mean() - exact.cdf(length)) < 0.015


def test_lengths_are_cut_to_their_limits():
    assert lengths(lognormal_requests(IDS, 200, math.inf, 0.1, 1e6, seed=0)).tolist() == [[4, 1024]] * 200


def test_generated_requests_are_greedy_and_never_end_early():
    assert {(r.sampling["temperature"], r.sampling["ignore_eos"]) for r in lognormal_requests(IDS, 5, 1, 9, 9, 0)} == {
        (0.0, True)
    }


def test_arrivals_are_a_poisson_process():
    arrivals = [request.arrival_s for request in lognormal_requests(IDS, 5000, 20.0, 10, 10, seed=0)]
    assert arrivals[0] == 0
    assert stats.kstest(np.diff(arrivals), stats.expon(scale=1 / 20).cdf).pvalue > 0.01


def test_infinite_rate_is_all_at_once():
    assert {request.arrival_s for request in lognormal_requests(IDS, 50, math.inf, 10, 10, seed=0)} == {0.0}


def test_the_corpus_is_long_python_source():
    text = corpus()
    assert len(text) == 600_000
    assert "import " in text
    assert text == corpus()


def test_prompts_of_a_file_keep_their_parameters(tmp_path):
    lines = {"prompt": "four words of text", "max_tokens": 5, "temperature": 0.5}, "", {"prompt": [1, 2, 3]}
    made = file_requests(write_lines(tmp_path / "p", *lines), None, 10.0, 0, lambda text: len(text.split()))
    assert [(r.prompt, r.num_prompt_tokens, r.sampling) for r in made] == [
        ("four words of text", 4, {"max_tokens": 5, "temperature": 0.5}),
        ([1, 2, 3], 3, {}),
    ]
    assert [r.arrival_s for r in made] == [0.0, random.Random(0).expovariate(10.0)]


def test_only_so_many_prompts_of_a_file_are_taken(tmp_path):
    path = write_lines(tmp_path / "p", *[{"prompt": [i]} for i in range(5)], "not JSON, and never read")
    assert [r.prompt for r in file_requests(path, 3, math.inf, 0, len)] == [[0], [1], [2]]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "no prompt"}', '{"prompt": 3}'])
def test_a_bad_line_is_named(tmp_path, line):
    path = write_lines(tmp_path / "prompts.jsonl", {"prompt": "good"}, line)
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: "):
        file_requests(path, None, math.inf, 0, len)


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no prompts"):
        file_requests(write_lines(tmp_path / "p", ""), None, math.inf, 0, len)
