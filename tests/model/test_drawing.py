"""Sets of allowed tokens against transformers' warpers; inversion against a plain cumulative sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from asyncscale.model.drawing import draw, thresholds

ALMOST_ONE = 1 - 2.0**-53


def allowed_by_transformers(logits, temperature, min_p, top_k, top_p):
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    for active, warper in (
        (min_p > 0, lambda: MinPLogitsWarper(min_p)),
        (top_k > 0, lambda: TopKLogitsWarper(top_k)),
        (top_p < 1, lambda: TopPLogitsWarper(top_p)),
    ):
        scores = warper()(None, scores) if active else scores
    return torch.isfinite(scores[0]).numpy()


def allowed(probabilities, top_k, top_p, min_p):
    limits = np.array(top_k, np.int32), np.array(top_p, np.float64), np.array(min_p, np.float32)
    return probabilities >= thresholds(probabilities, *limits)[:, None]


def softmax(logits, temperature):
    return torch.softmax(logits / torch.tensor(temperature)[:, None], 1).numpy()


row_limits = st.tuples(
    st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    st.sampled_from([0.0, 0.0, 0.001, 0.1, 0.6, 1.0]),
    st.sampled_from([0, 0, 1, 5, 63, 64, 65, 300]),
    st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.01]),
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.1, 1.0, 4.0, 12.0]),
    vocab_size=st.sampled_from([7, 64, 128, 500, 6000]),
    limits=st.lists(row_limits, min_size=1, max_size=6),
)
def test_allowed_tokens_are_those_of_transformers(seed, scale, vocab_size, limits):
    logits = torch.randn(len(limits), vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    limits = [(t, min_p, min(top_k, vocab_size - 1), top_p) for t, min_p, top_k, top_p in limits]
    temperature, min_p, top_k, top_p = zip(*limits, strict=True)
    probabilities = softmax(logits, temperature)
    ours = allowed(probabilities, top_k, top_p, min_p)
    for i, row in enumerate(limits):
        differ = np.flatnonzero((ours[i] != allowed_by_transformers(logits[i], *row)) & (probabilities[i] > 0))
        # Rounding may move one token across the border of top_p, where its mass there is nothing.
        assert len(differ) <= (row[3] < 1)
        assert probabilities[i, differ].sum() < 1e-5


def test_smallest_set_that_reaches_top_p_is_kept():
    probabilities = np.array([[0.125, 0.5, 0.25, 0.125]], np.float32)
    for top_p, expected in ((0.4, [1]), (0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (1e-9, [1])):
        assert np.flatnonzero(allowed(probabilities, [0], [top_p], [0])[0]).tolist() == expected


def test_top_p_counts_only_what_min_p_and_top_k_leave():
    probabilities = np.array([[0.4, 0.3, 0.2, 0.1]], np.float32)
    assert allowed(probabilities, [0], [0.6], [0])[0].tolist() == [True, True, False, False]
    assert allowed(probabilities, [2], [0.55], [0])[0].tolist() == [True, False, False, False]
    assert allowed(probabilities, [0], [0.55], [0.7])[0].tolist() == [True, False, False, False]


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (0, 0.4), (70, 1.0), (0, 0.9)])
def test_tied_tokens_stay_or_go_together(top_k, top_p):
    probabilities = np.repeat(np.array([[4.0, 2.0, 1.0]], np.float32), 50, axis=1)
    probabilities /= probabilities.sum()
    kept = allowed(probabilities, [top_k], [top_p], [0])[0].reshape(3, 50)
    assert (kept.all(1) | ~kept.any(1)).all()
    assert kept[0].all()
    assert not kept[2].any() or top_p == 0.9


@pytest.mark.parametrize("top_p", [0.2, 0.95])
def test_a_flat_row_is_cut_the_same_alone_and_beside_peaked_ones(top_p):
    logits = torch.randn(4, 10_000, generator=torch.Generator().manual_seed(0))
    logits[:3] *= 10
    together = softmax(logits, [1.0] * 4)
    cut = thresholds(together, np.zeros(4, np.int32), np.full(4, top_p), np.zeros(4, np.float32))
    alone = thresholds(together[3:], np.zeros(1, np.int32), np.full(1, top_p), np.zeros(1, np.float32))
    assert cut[3] == alone[0]
    kept = np.sort(together[3][together[3] >= cut[3]].astype(np.float64))
    assert kept.sum() >= top_p - 1e-6 > kept[1:].sum() - 2e-6


@settings(deadline=None, derandomize=True)
@given(weights=st.lists(st.integers(0, 2**20), min_size=1, max_size=700).filter(any), fraction=st.floats(0, 0.999))
def test_draw_inverts_the_cumulative_distribution(weights, fraction):
    target = int(fraction * sum(weights))
    expected = np.searchsorted(np.cumsum(weights), target, side="right")
    uniform = (target + 0.5) / sum(weights)
    assert draw(np.array([weights], np.float32), np.array([uniform]))[0] == expected


@pytest.mark.parametrize("offset", [0, 126, 127, 500])
def test_a_uniform_on_a_border_draws_the_token_above_it(offset):
    probabilities = np.zeros((4, offset + 4), np.float32)
    probabilities[:, offset : offset + 4] = [0.25, 0.25, 0.0, 0.5]
    uniforms = np.array([0.0, 0.25, 0.5, np.nextafter(0.5, 0)])
    assert (draw(probabilities, uniforms) - offset).tolist() == [0, 1, 3, 1]


@settings(deadline=None, derandomize=True)
@given(
    size=st.integers(1, 700),
    positive=st.sets(st.integers(0, 699), min_size=1, max_size=5),
    uniform=st.one_of(st.sampled_from([0.0, ALMOST_ONE]), st.floats(0, ALMOST_ONE)),
    scale=st.sampled_from([1e-38, 1e-20, 1.0]),
)
def test_a_token_of_probability_zero_is_never_drawn(size, positive, uniform, scale):
    probabilities = np.zeros((1, size), np.float32)
    probabilities[0, [token % size for token in positive]] = scale
    assert probabilities[0, draw(probabilities, np.array([uniform]))[0]] > 0


def test_lowest_and_highest_uniforms_draw_the_first_and_last_possible_token():
    probabilities = np.zeros((2, 1000), np.float32)
    probabilities[:, [3, 500, 998]] = [0.3, 0.3, 0.4]
    assert draw(probabilities, np.array([0.0, ALMOST_ONE])).tolist() == [3, 998]
