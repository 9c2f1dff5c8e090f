from __future__ import annotations

import pytest

from asyncscale.suggestions import closest, did_you_mean

NAMES = ["max_tokens", "min_tokens", "temperature", "Top_P"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_token", "max_tokens"),
        ("MAX_TOKENS", "max_tokens"),
        ("top_p", "Top_P"),
        ("temp", "temperature"),
        ("tmep", "temperature"),
        ("te", None),
        ("", None),
        ("xyz", None),
    ],
)
def test_the_closest_name(name: str, meant: str | None) -> None:
    assert closest(name, NAMES) == meant


def test_what_is_offered() -> None:
    assert did_you_mean("tempreature", NAMES) == "; did you mean 'temperature'?"
    assert did_you_mean("limit", NAMES, {"limit": "max_tokens"}) == "; did you mean 'max_tokens'?"
    assert did_you_mean("limit", NAMES) == "; known are max_tokens, min_tokens, temperature, Top_P"
