"""Tokens per second from counts that only grow."""

from __future__ import annotations

from collections.abc import Mapping

# Steps that take hundreds of milliseconds make a rate over less than this jump.
_WINDOW_S = 1.0
# What an attached client knows is new about once a second: until then its counts stand still.
_MAX_WINDOW_S = 2.5


class TokenRates:
    """Rates over the last second or two, by engine; none until there are two counts."""

    def __init__(self) -> None:
        self._since = float("-inf")
        self._before: Mapping[int, int] = {}
        self._rates: dict[int, float] = {}

    def update(self, counts: Mapping[int, int], now: float) -> Mapping[int, float]:
        """counts: so far, at `now`, in seconds of any clock. Returns the rates as they are now."""
        elapsed = now - self._since
        if elapsed < _WINDOW_S or (elapsed < _MAX_WINDOW_S and counts == self._before):
            return self._rates
        if elapsed < 2 * _MAX_WINDOW_S:
            self._rates = {engine: (count - self._before.get(engine, 0)) / elapsed for engine, count in counts.items()}
        else:  # nobody looked meanwhile: nothing happened for a part of that time
            self._rates = {}
        self._since, self._before = now, counts
        return self._rates
