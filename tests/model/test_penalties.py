"""Penalties against transformers and against a plain count."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from asyncscale.engine.request import Request
from asyncscale.model.penalties import RowPenalties, apply_penalties, is_penalized
from asyncscale.model.token_counts import TokenCounts
from asyncscale.params import Sampling

V = 50
token_ids = st.lists(st.integers(0, V - 1), max_size=60)


def penalties_of(prompt, generated, **sampling):
    known = np.array([*prompt, *generated], np.int32)
    return RowPenalties(Request(b"", 0, known, len(prompt), Sampling(max_tokens=100, **sampling)), V)


def random_logits(rows=1, seed=0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


@settings(deadline=None, derandomize=True)
@given(prompt=token_ids, generated=token_ids, penalty=st.sampled_from([0.5, 0.9, 1.1, 2.0]))
def test_repetition_penalty_is_that_of_transformers_over_prompt_and_output(prompt, generated, penalty):
    logits = random_logits()
    history = torch.tensor([[*prompt, *generated]], dtype=torch.long)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())
    apply_penalties(logits.numpy(), [0], [penalties_of(prompt, generated, repetition_penalty=penalty)])
    torch.testing.assert_close(logits, expected)


@settings(deadline=None, derandomize=True)
@given(prompt=token_ids, generated=token_ids, repetition=st.sampled_from([1.0, 1.3]))
def test_frequency_and_presence_penalty_count_generated_tokens_only(prompt, generated, repetition):
    sampling = {"repetition_penalty": repetition, "frequency_penalty": 0.25, "presence_penalty": -1.5}
    logits, counts = random_logits(), np.bincount(generated, minlength=V)
    expected = logits[0].numpy().astype(np.float64)
    seen = np.isin(np.arange(V), [*prompt, *generated])
    expected = np.where(seen, np.where(expected > 0, expected / repetition, expected * repetition), expected)
    expected -= 0.25 * counts - 1.5 * (counts > 0)
    apply_penalties(logits.numpy(), [0], [penalties_of(prompt, generated, **sampling)])
    np.testing.assert_allclose(logits[0].numpy(), expected, atol=1e-5)


@settings(deadline=None, derandomize=True)
@given(prompt=token_ids, generated=token_ids, cuts=st.lists(st.integers(0, 60), max_size=5))
def test_counting_step_by_step_equals_counting_at_once(prompt, generated, cuts):
    counts = TokenCounts(np.array(prompt, np.int32))
    for part in np.split(np.array(generated, np.int32), sorted(min(cut, len(generated)) for cut in cuts)):
        counts.extend(part)
    expected = np.bincount(generated, minlength=V)
    assert sorted(counts.token_ids.tolist()) == sorted({*prompt, *generated})
    assert counts.counts.tolist() == expected[counts.token_ids].tolist()
    assert counts.num_generated == len(generated)


def test_update_counts_only_what_is_new():
    row = penalties_of([1, 2], [3], frequency_penalty=1.0)
    for generated in ([3, 3], [3, 3], [3, 3, 4]):
        row.update(np.array(generated, np.int32))
    assert dict(zip(row.counts.token_ids.tolist(), row.counts.counts.tolist(), strict=True)) == {3: 2, 4: 1}


def test_each_row_of_a_batch_has_its_own_penalties_and_others_none():
    logits = random_logits(4)
    before = logits.clone()
    rows = [penalties_of([], [5] * 3, frequency_penalty=1.0), penalties_of([7, 8], [9], presence_penalty=0.5)]
    apply_penalties(logits.numpy(), [3, 1], rows)
    changed = {(i, j): (before - logits)[i, j].item() for i, j in (before != logits).nonzero().tolist()}
    assert changed.keys() == {(3, 5), (1, 9)}
    np.testing.assert_allclose([changed[3, 5], changed[1, 9]], [3.0, 0.5], atol=1e-5)


def test_prompt_tokens_beyond_the_vocabulary_have_no_logit_to_penalize():
    logits = random_logits()
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[4]]), logits.clone())
    apply_penalties(logits.numpy(), [0], [penalties_of([4, V, V + 9], [], repetition_penalty=1.5)])
    torch.testing.assert_close(logits, expected)


def test_banned_tokens_stay_banned():
    logits = torch.full((1, V), -torch.inf)
    apply_penalties(logits.numpy(), [0], [penalties_of([1], [2], repetition_penalty=1.5, frequency_penalty=-2.0)])
    assert (logits == -torch.inf).all()


def test_memory_follows_the_tokens_seen_not_the_vocabulary():
    counts = TokenCounts(np.array([10**6], np.int32))
    counts.extend(np.arange(1000, dtype=np.int32))
    assert len(counts.token_ids) == 1001
    assert counts._ids.nbytes + counts._counts.nbytes <= 4 * 8 * 1001


def test_neutral_values_penalize_nothing():
    assert not is_penalized(Sampling(max_tokens=1))
    assert is_penalized(Sampling(max_tokens=1, repetition_penalty=0.9))
    assert is_penalized(Sampling(max_tokens=1, presence_penalty=-0.1))
    assert is_penalized(Sampling(max_tokens=1, frequency_penalty=0.1))
