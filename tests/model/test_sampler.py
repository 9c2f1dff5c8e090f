"""The whole sampler: exact distributions, order of processing, and rows that do not disturb each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from asyncscale.engine.batch import SequenceTable
from asyncscale.engine.request import Request
from asyncscale.kernels.sampling import load_sampling
from asyncscale.model import sampler as sampler_module
from asyncscale.model.numpy_sampling import NumpySampling
from asyncscale.model.sampler import Sampler
from asyncscale.params import Sampling

V = 300
NAN = float("nan")


@pytest.fixture(params=["native", "numpy"], autouse=True)
def make_kernels(request, monkeypatch):
    """Each test runs with the native kernels, and without."""
    if request.param == "native" and load_sampling(V) is None:
        pytest.skip("the native library was not built")
    made = load_sampling if request.param == "native" else lambda _: NumpySampling()
    monkeypatch.setattr(Batch, "make_kernels", staticmethod(made), raising=False)


class Batch:
    """Sequences in rows of a table, stepped with logits that are a function of a row's own tokens."""

    def __init__(self, vocab_size=V, max_num_seqs=64):
        self.table = SequenceTable(max_num_seqs, 512, 16)
        self.sampler = Sampler(max_num_seqs, vocab_size, self.make_kernels(vocab_size))
        self.vocab_size = vocab_size

    def add(self, row, prompt=(1, 2, 3), generated=(), **sampling):
        known = np.array([*prompt, *generated], np.int32)
        self.table.token_ids[row, : len(known)] = known
        self.table.num_tokens[row], self.table.num_prompt_tokens[row] = len(known), len(prompt)
        self.sampler.add(row, Request(b"", row, known, len(prompt), Sampling(max_tokens=400, **sampling)))
        return self

    def sample(self, logits, rows, positions=None):
        rows = np.array(rows, np.int32)
        logits = torch.as_tensor(logits, dtype=torch.float32).clone().numpy()
        sampled = self.sampler.sample(logits, rows, self.table, positions)
        for row, token_id in zip(rows if positions is None else (), sampled.token_ids, strict=positions is None):
            self.table.token_ids[row, self.table.num_tokens[row]] = token_id
            self.table.num_tokens[row] += 1
        return sampled

    def logits(self, row):
        known = self.table.token_ids[row, : self.table.num_tokens[row]]
        seed = int(known.astype(np.int64) @ np.arange(1, len(known) + 1) * 31)
        return torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed)) * 3

    def step(self, rows):
        return self.sample(torch.stack([self.logits(row) for row in rows]), rows)

    def generated(self, row):
        return self.table.token_ids[row, self.table.num_prompt_tokens[row] : self.table.num_tokens[row]].tolist()


def one_token(logits, **sampling):
    batch = Batch(len(logits)).add(0, **sampling)
    return batch.sample([logits], [0]).token_ids[0]


# --- distributions


def exact_distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    p = np.exp(np.float64(logits) / temperature)
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


def drawn_counts(logits, steps=320, **sampling):
    """Counts of 64 * steps draws from the same logits: 64 seeds, `steps` positions."""
    batch, rows = Batch(), range(64)
    for row in rows:
        batch.add(row, seed=row, **sampling)
    same = torch.as_tensor(logits, dtype=torch.float32).expand(64, -1)
    return np.bincount(np.concatenate([batch.sample(same, rows).token_ids for _ in range(steps)]), minlength=V)


def p_value(counts, expected):
    assert counts[expected == 0].sum() == 0, "a token outside of the allowed set was drawn"
    expected = expected * counts.sum()
    likely = expected >= 5
    rest_counts, rest_expected = counts[~likely].sum(), expected[~likely].sum()
    if rest_expected < 5:
        return stats.chisquare(counts[likely], expected[likely], sum_check=False).pvalue
    return stats.chisquare([*counts[likely], rest_counts], [*expected[likely], rest_expected]).pvalue


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.3, "top_k": 100},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 2.5, "top_p": 0.95},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.5, "min_p": 0.02, "top_k": 40, "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(sampling):
    logits = np.random.default_rng(1).normal(0, 2, V)
    counts = drawn_counts(logits, **sampling)
    assert p_value(counts, exact_distribution(logits, **sampling)) > 1e-3
    # The same test sees a temperature that is off by a tenth.
    wrong = exact_distribution(logits, **sampling) ** 1.1
    assert p_value(counts, wrong / wrong.sum()) < 1e-4


def test_successive_draws_of_one_seed_are_independent():
    batch = Batch(8).add(0, temperature=1.0, seed=3)
    tokens = [int(batch.sample(torch.zeros(1, 8), [0]).token_ids[0]) for _ in range(500)]
    pairs = np.zeros((8, 8))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


# --- greedy and the order of processing


def test_greedy_takes_the_lowest_of_equally_likely_tokens():
    assert one_token([0.0, 2.0, 1.0, 2.0, 2.0]) == 1


def test_a_temperature_below_epsilon_is_greedy():
    logits = [0.0, 1e-6, 0.0]
    assert {one_token(logits, temperature=9e-6, seed=seed) for seed in range(20)} == {1}
    assert {one_token(logits, temperature=1.0, seed=seed) for seed in range(20)} == {0, 1, 2}


def test_bias_comes_before_penalties():
    # -1 + 3 = 2, halved is 1 < 1.5; penalized first it would be -2 + 3 = 1, and then win against 0.5.
    assert one_token([-1.0, 1.5], prompt=[0], logit_bias=((0, 3.0),), repetition_penalty=2.0) == 1
    assert one_token([-1.0, 0.5], prompt=[0], logit_bias=((0, 3.0),), repetition_penalty=2.0) == 0
    assert one_token([-1.0, 1.5], prompt=[0], logit_bias=((0, 3.0),)) == 0


def test_repetition_penalty_comes_before_frequency_penalty():
    # (4 / 2) - 1 = 1 < 1.2; the other way round it would be (4 - 1) / 2 = 1.5.
    assert one_token([4.0, 1.2], prompt=[0], generated=[0], repetition_penalty=2.0, frequency_penalty=1.0) == 1


def test_temperature_comes_before_min_p():
    # Probabilities 0.9 and 0.1: at temperature 1 the second is below min_p, at 5 it is not.
    logits = np.log([0.9, 0.1]).tolist()
    drawn = {t: {one_token(logits, temperature=t, min_p=0.3, seed=seed) for seed in range(50)} for t in (1.0, 5.0)}
    assert drawn == {1.0: {0}, 5.0: {0, 1}}


def test_penalties_and_bans_hold_for_greedy_and_random_rows_alike():
    for temperature in (0.0, 0.2):
        batch = Batch(5).add(0, temperature=temperature, frequency_penalty=2.0, bad_words_token_ids=((4,),))
        tokens = [int(batch.sample([[9.0, 8.9, 8.8, 0.0, 50.0]], [0]).token_ids[0]) for _ in range(6)]
        assert sorted(tokens) == [0, 0, 1, 1, 2, 2]


def test_min_tokens_counts_generated_tokens():
    batch = Batch(3).add(0, prompt=(1,) * 9, min_tokens=3, stop_token_ids=(2,))
    assert [int(batch.sample([[0.0, 1.0, 2.0]], [0]).token_ids[0]) for _ in range(5)] == [1, 1, 1, 2, 2]


def test_bad_words_look_at_generated_tokens_not_at_the_prompt():
    word = ((1, 2),)
    assert one_token([0.0, 1.0, 2.0], prompt=[1], bad_words_token_ids=word) == 2
    assert one_token([0.0, 1.0, 2.0], prompt=[0], generated=[1], bad_words_token_ids=word) == 1


# --- log-probabilities


def test_logprobs_are_of_the_raw_logits_whatever_is_done_to_them():
    batch = Batch().add(0, logprobs=3, logit_bias=((7, 100.0),), temperature=0.5, top_k=1, repetition_penalty=1.5)
    logits = batch.logits(0)
    expected = torch.log_softmax(logits, 0)
    sampled = batch.sample(logits[None], [0])
    entry = sampled.logprobs[0]
    assert sampled.token_ids[0] == 7
    assert entry.token_ids == [7, *expected.topk(3).indices.tolist()]
    np.testing.assert_allclose(entry.logprobs, expected[entry.token_ids], atol=1e-5)
    assert entry.rank == 1 + int((expected > expected[7]).sum())


def test_only_rows_that_ask_get_logprobs_and_as_many_as_they_ask_for():
    batch = Batch().add(2).add(5, logprobs=0).add(9, logprobs=4, temperature=1.0).add(11, logprobs=10**6)
    sampled = batch.step([9, 2, 5, 11])
    assert {row: len(entry.token_ids) for row, entry in sampled.logprobs.items()} == {5: 1, 9: 5, 11: 1 + V}
    assert sampled.logprobs[9].token_ids[0] == sampled.token_ids[0]
    assert sampled.logprobs[5].rank == 1


# --- rows alone and in a crowd

VARIED = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.9, "top_p": 0.99},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 200, "top_p": 0.97},
    {"temperature": 1.2, "min_p": 0.1},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 1.0, "logit_bias": ((5, 4.0),), "min_tokens": 9, "stop_token_ids": (5,), "logprobs": 2},
    {"presence_penalty": 1.5, "bad_words_token_ids": ((1,), (2, 3)), "logprobs": 90},
]


def tokens_alone(sampling, steps):
    batch = Batch().add(0, **sampling)
    for _ in range(steps):
        batch.step([0])
    return batch.generated(0)


def test_a_row_gets_the_same_tokens_alone_and_in_a_changing_crowd():
    crowd, rng = Batch(), np.random.default_rng(0)
    samplings = [{**sampling, "seed": 2**63 + i} for i, sampling in enumerate(VARIED * 3)]
    rows = rng.permutation(64)[: len(samplings)].tolist()
    for row, sampling in zip(rows, samplings, strict=True):
        crowd.add(row, **sampling)
    for _ in range(60):
        crowd.step(rng.permutation(rows)[: rng.integers(1, len(rows) + 1)].tolist())
    for row, sampling in zip(rows, samplings, strict=True):
        generated = crowd.generated(row)
        assert len(generated) > 10
        assert generated == tokens_alone(sampling, len(generated))


@pytest.mark.parametrize("sampling", VARIED, ids=str)
def test_a_preempted_request_goes_on_as_if_nothing_had_happened(sampling):
    batch = Batch().add(0, seed=11, **sampling)
    for _ in range(8):
        batch.step([0])
    batch.sampler.remove(0)
    batch.add(0, seed=12, temperature=1.0, repetition_penalty=1.7, logit_bias=((3, 9.0),))
    elsewhere = Batch().add(40, generated=tokens_alone({**sampling, "seed": 11}, 8), seed=11, **sampling)
    for _ in range(8):
        elsewhere.step([40])
    assert elsewhere.generated(40) == tokens_alone({**sampling, "seed": 11}, 16)


@pytest.mark.parametrize("token_id", [3, V])
def test_a_row_forgets_the_request_that_had_it_before(token_id):
    batch = Batch().add(0, temperature=1.0, repetition_penalty=1.7, logit_bias=((token_id, 90.0),), logprobs=1)
    batch.step([0])
    batch.sampler.remove(0)
    batch.sampler.remove(0)
    batch.add(0)
    logits = batch.logits(0)
    sampled = batch.sample(logits[None], [0])
    assert sampled.token_ids[0] == logits.argmax()
    assert (sampled.logprobs, sampled.errors) == ({}, {})


def test_every_bit_of_the_seed_matters():
    batch = Batch().add(0, seed=0, temperature=2.0).add(1, seed=2**64 - 1, temperature=2.0)
    for bit in range(0, 62):
        batch.add(2 + bit, seed=1 << (2 + bit), temperature=2.0)
    logits = torch.zeros(64, V)
    tokens = np.stack([batch.sample(logits, range(64)).token_ids for _ in range(8)])
    assert len({tuple(column) for column in tokens.T.tolist()}) == 64


def test_tiny_differences_of_the_logits_hardly_ever_change_a_draw():
    batch, noisy, rng = Batch(4000), Batch(4000), np.random.default_rng(0)
    for row in range(64):
        for each in (batch, noisy):
            each.add(row, temperature=1.0, top_p=0.95, seed=row)
    differ = 0
    for _ in range(20):
        logits = rng.normal(0, 3, (64, 4000)).astype(np.float32)
        noise = rng.normal(0, 1e-6, logits.shape).astype(np.float32)
        differ += (batch.sample(logits, range(64)).token_ids != noisy.sample(logits + noise, range(64)).token_ids).sum()
    assert differ == 0


def test_several_positions_of_a_row_are_drawn_at_once_as_one_after_the_other():
    sampling = {"temperature": 1.0, "top_p": 0.9, "seed": 5}
    batch, together = Batch().add(3, **sampling), Batch().add(3, **sampling)
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(0))
    expected = [int(batch.sample(row[None], [3]).token_ids[0]) for row in logits]
    assert len(set(expected)) > 3
    positions = np.arange(6, dtype=np.int32) + 3
    assert together.sample(logits, [3] * 6, positions).token_ids.tolist() == expected


# --- rows that cannot be sampled


@pytest.mark.parametrize("sampling", VARIED, ids=str)
@pytest.mark.parametrize("bad", ["all nan", "one nan", "all banned", "one infinite"])
def test_a_row_without_a_token_is_an_error_of_its_own(bad, sampling):
    batch = Batch().add(0, seed=1, **sampling).add(1, seed=2, temperature=1.0).add(2, seed=3)
    alone = Batch().add(1, seed=2, temperature=1.0).add(2, seed=3)
    logits = torch.stack([batch.logits(row) for row in range(3)])
    if bad == "all nan":
        logits[0] = NAN
    elif bad == "one nan":
        logits[0, 100] = NAN
    elif bad == "one infinite":
        logits[0, 100] = torch.inf
    else:
        logits[0] = -torch.inf
    sampled = batch.sample(logits, [0, 1, 2])
    assert sampled.errors.keys() == {0}
    assert ("no token" if bad == "all banned" else "the model computed") in sampled.errors[0]
    assert 0 not in sampled.logprobs
    assert sampled.token_ids[1:].tolist() == alone.sample(logits[1:], [1, 2]).token_ids.tolist()


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("logit_bias", {"logit_bias": ((V, 1.0),)}),
        ("bad_words", {"bad_words_token_ids": ((1, 2), (V + 7, 1))}),
        ("stop_token_ids", {"min_tokens": 2, "stop_token_ids": (1, 10**9)}),
    ],
)
def test_token_ids_beyond_the_vocabulary_are_an_error_of_that_row_alone(name, sampling):
    batch = Batch().add(0, **sampling, logprobs=1).add(1, logit_bias=((5, 99.0),))
    sampled = batch.step([0, 1])
    assert sampled.errors.keys() == {0}
    assert name in sampled.errors[0]
    assert sampled.token_ids[1] == 5
    assert sampled.logprobs == {}


def test_stop_tokens_beyond_the_vocabulary_are_harmless_without_min_tokens():
    assert not Batch().add(0, stop_token_ids=(10**9,)).step([0]).errors


def test_banning_every_token_is_an_error_naming_it():
    batch = Batch(4).add(0, bad_words_token_ids=((0,), (1,), (2,), (3,)), temperature=1.0)
    assert "no token may come next" in batch.sample(torch.zeros(1, 4), [0]).errors[0]


# --- work that is not done


def refuse(*_args, **_kwargs):
    raise AssertionError("work that this batch does not need")


def test_a_greedy_batch_costs_an_argmax_and_nothing_else(monkeypatch):
    for name in ("uniforms", "token_logprobs", "apply_bias", "apply_penalties"):
        monkeypatch.setattr(sampler_module, name, refuse)
    batch = Batch().add(0).add(1)
    assert not batch.step([1, 0]).errors
