"""Drawing and log-probabilities against plain float64: on every instruction set that this CPU has, and in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from asyncscale.kernels.library import INSTRUCTION_SETS, load_library
from asyncscale.kernels.sampling import DRAW, NativeSampling, SamplingKernels
from asyncscale.model.numpy_sampling import NumpySampling

ALMOST_ONE = 1 - 2.0**-53
KINDS = ("numpy", *(isa for isa in INSTRUCTION_SETS if load_library(isa)))


def make(kind: str, vocab_size: int) -> SamplingKernels:
    library = None if kind == "numpy" else load_library(kind)
    return NumpySampling() if library is None else NativeSampling(library, vocab_size)


def draws_of(logits: np.ndarray, uniforms: object, index: object = None, **limits: object) -> np.ndarray:
    draws = np.zeros(len(np.atleast_1d(np.asarray(uniforms))), DRAW)
    draws["temperature"], draws["top_p"], draws["uniform"] = 1.0, 1.0, uniforms
    draws["index"] = np.arange(len(draws)) if index is None else index
    for name, value in limits.items():
        draws[name] = value
    draws["highest"] = logits.max(1)[draws["index"]]
    return draws


def distribution(
    logits: np.ndarray, temperature: float, min_p: float, top_k: int, top_p: float
) -> tuple[np.ndarray, float]:
    """Exact probabilities of the tokens that may come; and how near the border of top_p is to a token's."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / np.float64(np.float32(temperature)))
    weights[weights < np.float32(min_p)] = 0
    if top_k:
        weights[weights < np.sort(weights)[-top_k]] = 0
    descending = np.sort(weights)[::-1] / weights.sum()
    cumulative = descending.cumsum()
    least = descending[np.flatnonzero(cumulative >= top_p - 1e-15)[0]] if top_p < 1 else 0
    probabilities = np.where(weights / weights.sum() >= least, weights, 0)
    return probabilities / probabilities.sum(), float(np.abs(cumulative - top_p).min())


limits = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.8, 1.0, 1.7]),
        "min_p": st.sampled_from([0.0, 0.0, 0.001, 0.1, 0.6, 1.0]),
        "top_k": st.sampled_from([0, 0, 1, 5, 64, 65, 300]),
        "top_p": st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.01]),
    }
)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.1, 1.0, 4.0, 12.0]),
    vocab_size=st.sampled_from([7, 127, 128, 500, 6000]),
    limits=limits,
)
def test_tokens_are_drawn_where_the_exact_distribution_has_them(
    kind: str, seed: int, scale: float, vocab_size: int, limits: dict[str, float]
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (1, vocab_size)).astype(np.float32)
    limits["top_k"] = min(limits["top_k"], vocab_size - 1)
    probabilities, nearness = distribution(logits[0], **limits)
    assume(nearness > 1e-5 or limits["top_p"] == 1)
    uniforms = rng.random(64)
    token_ids = make(kind, vocab_size).draw(logits, draws_of(logits, uniforms, 0, **limits))
    assert (probabilities[token_ids] > 0).all()
    upper = probabilities.cumsum()[token_ids]
    assert (uniforms < upper + 1e-5).all()
    assert (uniforms > upper - probabilities[token_ids] - 1e-5).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (40, 1.0), (700, 1.0), (0, 0.3), (0, 0.95), (0, 0.9999)])
def test_sets_of_a_large_vocabulary_are_exact(kind: str, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (2, 50_000)).astype(np.float32)
    logits[1, 777:786] += 25  # the likely ones are fewer than top_k, the others far away
    uniforms = (np.arange(400) + 0.5) / 400
    for row in range(2):
        draws = draws_of(logits, uniforms, row, top_k=top_k, top_p=top_p)
        token_ids = make(kind, 50_000).draw(logits, draws)
        probabilities, _ = distribution(logits[row], 1.0, 0.0, top_k, top_p)
        assert (probabilities[token_ids] > 0).all()
        assert set(np.flatnonzero(probabilities > 1 / 300)) <= set(token_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limits", [{}, {"top_k": 2}, {"top_p": 0.4}, {"min_p": 0.5}, {"top_k": 70}, {"top_p": 0.6}])
def test_equals_of_the_last_token_stay_with_it(kind: str, limits: dict[str, float]) -> None:
    logits = np.log(np.repeat(np.array([[4.0, 2.0, 1.0]], np.float32), 50, axis=1))
    uniforms = np.linspace(0, ALMOST_ONE, 999)
    drawn = set(make(kind, 150).draw(logits, draws_of(logits, uniforms, 0, **limits)).tolist())
    expected = {"top_k": {2: 50, 70: 100}, "top_p": {0.4: 50, 0.6: 100}, "min_p": {0.5: 100}}
    count = next((expected[name][value] for name, value in limits.items()), 150)
    assert drawn == set(range(count))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, derandomize=True)
@given(
    size=st.integers(1, 700),
    positive=st.sets(st.integers(0, 699), min_size=1, max_size=5),
    uniform=st.one_of(st.sampled_from([0.0, ALMOST_ONE]), st.floats(0, ALMOST_ONE)),
)
def test_a_banned_token_is_never_drawn(kind: str, size: int, positive: set[int], uniform: float) -> None:
    allowed = sorted({token % size for token in positive})
    logits = np.full((1, size), -np.inf, np.float32)
    logits[0, allowed] = -30.0
    [token_id] = make(kind, size).draw(logits, draws_of(logits, [uniform]))
    assert token_id in allowed
    if uniform in (0.0, ALMOST_ONE):
        assert token_id == allowed[0 if uniform == 0 else -1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [5, 128, 300, 1000])
@pytest.mark.parametrize("num_top", [0, 1, 5, 64, 65, 1000])
def test_log_probabilities_are_those_of_log_softmax(kind: str, vocab_size: int, num_top: int) -> None:
    num_top = min(num_top, vocab_size)
    rng = np.random.default_rng(num_top)
    logits = rng.normal(0, 4, (150, vocab_size)).astype(np.float32)
    logits[:, rng.integers(vocab_size, size=2)] = -np.inf
    indices, token_ids = rng.permutation(150)[:70], rng.integers(vocab_size, size=70)
    exact = logits[indices].astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    found = make(kind, vocab_size).log_probabilities(logits, indices, token_ids, num_top)
    order = np.argsort(-exact, axis=1, kind="stable")
    np.testing.assert_array_equal(found.top_ids, order[:, :num_top])
    np.testing.assert_allclose(found.top, np.take_along_axis(exact, order[:, :num_top], 1), atol=1e-5)
    chosen = exact[np.arange(70), token_ids]
    np.testing.assert_allclose(found.chosen, chosen, atol=1e-5)
    np.testing.assert_array_equal(found.ranks, 1 + (exact > chosen[:, None]).sum(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_top", [1, 5, 39, 70])
def test_the_lowest_ids_of_many_equally_likely_tokens_are_listed(kind: str, num_top: int) -> None:
    logits = np.zeros((1, 1000), np.float32)
    logits[0, 3::25] = 2.0
    found = make(kind, 1000).log_probabilities(logits, np.array([0]), np.array([0]), num_top)
    others = [token_id for token_id in range(1000) if token_id % 25 != 3]
    assert found.top_ids[0].tolist() == (list(range(3, 1000, 25)) + others)[:num_top]
    assert found.ranks.tolist() == [41]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_log_probabilities_of_rows_that_hold_no_numbers_do_no_harm(kind: str, bad: float) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    logits[0], logits[1, 100], logits[3, ::2] = bad, bad, bad
    arguments = np.array([2, 1, 0, 3]), np.array([1, 2, 3, 4])
    for num_top in (0, 3, 100, 300):
        kernels = make(kind, 300)
        found = kernels.log_probabilities(logits, *arguments, num_top)
        assert ((found.top_ids >= 0) & (found.top_ids < 300)).all()
        alone = kernels.log_probabilities(logits[2:3], np.array([0]), np.array([1]), num_top)
        assert (found.chosen[0], found.top_ids[0].tolist()) == (alone.chosen[0], alone.top_ids[0].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_bit_by_bit_the_same_alone_and_beside_others(kind: str) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (40, 1001)).astype(np.float32)
    kernels = make(kind, 1001)
    token_ids = rng.integers(1001, size=40)
    together = kernels.log_probabilities(logits, np.arange(40), token_ids, 7)
    limits = {"top_k": rng.integers(0, 50, 40), "top_p": rng.choice([0.5, 0.9, 1.0], 40), "min_p": 0.001}
    draws = draws_of(logits, rng.random(40), **limits)
    drawn = kernels.draw(logits, draws)
    for i in range(40):
        alone = kernels.log_probabilities(logits[i : i + 1].copy(), np.array([0]), token_ids[i : i + 1], 7)
        assert alone.chosen[0] == together.chosen[i]
        assert np.array_equal(alone.top[0], together.top[i])
        draw = draws[i : i + 1].copy()
        draw["index"] = 0
        assert kernels.draw(logits[i : i + 1].copy(), draw)[0] == drawn[i]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_left_alone(kind: str) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 10)).astype(np.float32)
    before = logits.copy()
    kernels = make(kind, 10)
    kernels.log_probabilities(logits, np.arange(2), np.arange(2), 3)
    kernels.draw(logits, draws_of(logits, [0.5, 0.6], top_k=3))
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("logits", [np.zeros((2, 9), np.float32), np.zeros((2, 10)), np.zeros((10, 2), np.float32).T])
def test_logits_that_the_native_kernels_would_misread_are_refused(logits: np.ndarray) -> None:
    for kind in KINDS[1:]:
        with pytest.raises(ValueError, match=r"contiguous float32\[m, 10\]"):
            make(kind, 10).draw(logits, np.zeros(1, DRAW))
