"""Bias and bans against transformers' processors."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from asyncscale.model.bias import apply_bias, is_biased
from asyncscale.params import Sampling

V = 6
generated_ids = st.lists(st.integers(0, V - 1), max_size=8)


def processed(generated, **sampling):
    logits = torch.arange(V, dtype=torch.float32)[None] - 2
    apply_bias(logits.numpy(), [0], [Sampling(max_tokens=99, **sampling)], [np.array(generated, np.int32)])
    return logits


def by_transformers(processor, generated):
    return processor(torch.tensor([generated], dtype=torch.long), torch.arange(V, dtype=torch.float32)[None] - 2)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    generated=generated_ids,
    words=st.sets(st.lists(st.integers(0, V - 1), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6),
)
def test_bad_words_are_banned_as_in_transformers(generated, words):
    expected = by_transformers(NoBadWordsLogitsProcessor([list(word) for word in words]), generated)
    torch.testing.assert_close(processed(generated, bad_words_token_ids=tuple(words)), expected)


def test_a_bad_word_of_two_tokens_bans_its_last_only_after_its_first():
    words = ((1, 2),)
    assert not torch.isinf(processed([0, 0], bad_words_token_ids=words)).any()
    assert torch.isinf(processed([0, 1], bad_words_token_ids=words))[0].tolist() == [False, False, True] + [False] * 3


@settings(deadline=None, derandomize=True)
@given(bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100, width=32), min_size=1))
def test_logit_bias_is_that_of_transformers(bias):
    expected = by_transformers(SequenceBiasLogitsProcessor({(i,): float(value) for i, value in bias.items()}), [0])
    torch.testing.assert_close(processed([0], logit_bias=tuple(bias.items())), expected)


@settings(deadline=None, derandomize=True)
@given(generated=generated_ids, min_tokens=st.integers(0, 9))
def test_min_tokens_bans_stop_tokens_as_in_transformers(generated, min_tokens):
    processor = MinNewTokensLengthLogitsProcessor(0, min_tokens, [1, 4], device="cpu")
    expected = by_transformers(processor, generated)
    torch.testing.assert_close(processed(generated, min_tokens=min_tokens, stop_token_ids=(1, 4)), expected)


def test_no_bias_lifts_a_ban():
    both = processed([], logit_bias=((1, 1e30),), min_tokens=1, stop_token_ids=(1,), bad_words_token_ids=((1,), (1,)))
    assert both[0, 1] == -torch.inf


def test_each_row_of_a_batch_has_its_own():
    logits = torch.zeros(3, V)
    samplings = [Sampling(max_tokens=9, logit_bias=((1, 2.5),)), Sampling(max_tokens=9, bad_words_token_ids=((3,),))]
    apply_bias(logits.numpy(), [2, 0], samplings, [np.zeros(0, np.int32)] * 2)
    expected = torch.zeros(3, V)
    expected[2, 1], expected[0, 3] = 2.5, -torch.inf
    assert torch.equal(logits, expected)


def test_only_requests_with_something_to_add_count_as_biased():
    assert not is_biased(Sampling(max_tokens=1, min_tokens=1))
    assert not is_biased(Sampling(max_tokens=1, stop_token_ids=(1,)))
    assert is_biased(Sampling(max_tokens=1, min_tokens=1, stop_token_ids=(1,)))
    assert is_biased(Sampling(max_tokens=1, logit_bias=((1, 0.5),)))
    assert is_biased(Sampling(max_tokens=1, bad_words_token_ids=((1,),)))
