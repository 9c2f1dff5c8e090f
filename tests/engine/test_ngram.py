"""The index against a search through the whole sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncscale.engine.ngram import NgramIndex

TOKENS = st.integers(0, 2)


def search(tokens: list[int], limit: int) -> list[int]:
    """What `propose` should say, found by looking at every position."""
    for size in (4, 3, 2):
        for start in range(len(tokens) - 1, size - 1, -1):
            if tokens[start - size : start] == tokens[len(tokens) - size :]:
                period = tokens[start:]
                return [period[i % len(period)] for i in range(limit)]
    return []


@given(parts=st.lists(st.lists(TOKENS, max_size=12), max_size=8), limit=st.integers(1, 8))
def test_what_followed_the_longest_match_where_it_came_last_however_the_text_came(parts, limit):
    index = NgramIndex()
    tokens: list[int] = []
    for part in parts:
        index.extend(part)
        tokens += part
        assert len(index) == len(tokens)
        assert index.propose(limit) == search(tokens, limit)


def test_a_longer_match_is_worth_more_than_a_later_one():
    index = NgramIndex()
    index.extend([1, 2, 3, 4, 10, 3, 4, 20, 1, 2, 3, 4])
    assert index.propose(3) == [10, 3, 4]


def test_text_that_repeats_itself_is_guessed_to_go_on_so():
    index = NgramIndex()
    index.extend([9, 1, 2, 1, 2])
    assert index.propose(5) == [1, 2, 1, 2, 1]
