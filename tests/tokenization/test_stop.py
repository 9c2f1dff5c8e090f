from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncscale.tokenization.stop import StopStrings

LETTERS = "ab\n😀"
WORDS = st.text(LETTERS, min_size=1, max_size=5)


def search(text: str, stop: tuple[str, ...], include: bool) -> tuple[str, bool]:
    """The definition, naively: the shortest beginning of the text that ends with a stop string ends it."""
    for end in range(1, len(text) + 1):
        ends_with = [word for word in stop if text[:end].endswith(word)]
        if ends_with:
            return text[:end] if include else text[: end - max(map(len, ends_with))], True
    return text, False


@settings(max_examples=1000, deadline=None)
@given(
    pieces=st.lists(st.text(LETTERS, max_size=6)), stop=st.lists(WORDS, min_size=1, max_size=4), include=st.booleans()
)
def test_it_finds_what_a_search_of_the_whole_text_finds(pieces: list[str], stop: list[str], include: bool) -> None:
    expected, found = search("".join(pieces), tuple(stop), include)
    stream = StopStrings(tuple(stop), include)
    shown = ""
    for piece in pieces:
        shown += stream.push(piece)
        assert expected.startswith(shown)
        if stream.stopped:
            assert shown == expected
    assert shown + stream.finish() == expected
    assert stream.stopped == found


@settings(max_examples=500, deadline=None)
@given(text=st.text(LETTERS, max_size=20), stop=st.lists(WORDS, min_size=1, max_size=4))
def test_it_holds_back_no_more_than_it_must(text: str, stop: list[str]) -> None:
    stream = StopStrings(tuple(stop), include=False)
    shown = "".join(map(stream.push, text))
    held = text[len(shown) :]
    if not stream.stopped:
        assert held == "" or any(word.startswith(held) and word != held for word in stop)


@pytest.mark.parametrize(
    ("stop", "pieces", "include", "expected"),
    [
        (("END",), ["text E", "N", "D more"], False, "text "),
        (("END",), ["text E", "N", "D more"], True, "text END"),
        (("END",), ["text EN", "E"], False, "text ENE"),
        (("abcd", "bc"), ["abcd"], False, "a"),  # "bc" is complete first
        (("bc", "abc"), ["abc"], False, ""),  # both at once: the longer
        (("aab",), ["aaab"], False, "a"),
    ],
)
def test_examples(stop: tuple[str, ...], pieces: list[str], include: bool, expected: str) -> None:
    stream = StopStrings(stop, include)
    assert "".join(map(stream.push, pieces)) + stream.finish() == expected


def test_after_the_end_nothing_is_shown() -> None:
    stream = StopStrings(("x",), include=False)
    assert stream.push("axb") == "a"
    assert stream.push("more") == stream.finish() == ""
    assert stream.stopped
