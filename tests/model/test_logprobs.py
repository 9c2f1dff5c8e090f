"""Reported log-probabilities and ranks against a plain log-softmax in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncscale.model.logprobs import prompt_logprobs


@pytest.mark.parametrize("num_top", [0, 1, 5, 64, 100, 300])
def test_values_ids_and_ranks_are_those_of_log_softmax(num_top):
    generator = torch.Generator().manual_seed(num_top)
    logits = (torch.randn(150, 300, generator=generator) * 4).numpy()
    token_ids = torch.randint(300, (150,), generator=generator).numpy().astype(np.int32)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), 1).numpy()
    entries = prompt_logprobs(logits, token_ids, num_top)
    assert len(entries) == 150
    for i, entry in enumerate(entries):
        best = np.argsort(-expected[i])[:num_top].tolist()
        assert entry.token_ids == [token_ids[i], *best]
        np.testing.assert_allclose(entry.logprobs, expected[i, entry.token_ids], atol=1e-5)
        assert entry.rank == 1 + np.argsort(-expected[i]).tolist().index(token_ids[i])


def test_equally_likely_tokens_share_a_rank_and_come_in_order_of_id():
    logits = np.array([[1.0, 3.0, 2.0, 3.0, 2.0]], np.float32)
    first, second = (prompt_logprobs(logits, np.array([i], np.int32), 4)[0] for i in (3, 4))
    assert first.token_ids == [3, 1, 3, 2, 4]
    assert (first.rank, second.rank) == (1, 3)


@pytest.mark.parametrize("num_top", [1, 5, 39])
def test_the_lowest_ids_of_many_equally_likely_tokens_are_listed(num_top):
    logits = np.zeros((1, 1000), np.float32)
    logits[0, 3::25] = 2.0
    assert (
        prompt_logprobs(logits, np.array([0], np.int32), num_top)[0].token_ids[1:] == list(range(3, 1000, 25))[:num_top]
    )


def test_logits_are_left_alone():
    logits = torch.randn(2, 10).numpy()
    before = logits.copy()
    prompt_logprobs(logits, np.zeros(2, np.int32), 3)
    assert np.array_equal(logits, before)


def test_no_positions_give_no_entries():
    assert prompt_logprobs(np.zeros((0, 10), np.float32), np.zeros(0, np.int32), 2) == []
