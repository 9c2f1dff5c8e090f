"""When an engine that died is started again, and when no more. No I/O, no clock of its own."""

from __future__ import annotations

# A life that was longer than this, and than so many times what it took to start, is a good one: what ended it has
# nothing to do with how the engine began.
_GOOD_LIFE_S = 1.0
_GOOD_LIFE_PER_START = 2.0
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 30.0


class RestartHistory:
    """The deaths of one engine, and what follows from them::

        history = RestartHistory(max_restarts=8)
        delay = history.died(lived_s, start_s)  # None: it has died too often

    lived_s: seconds for which it was ready to serve; start_s: for which it was started before. It is started again at
    once after a good life, and with growing delays after short ones; when `max_restarts` lives in a row were short, it
    is given up. 0: it is not started again.
    """

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._num_short_lives = 0
        self._delay = 0.0

    def died(self, lived_s: float, start_s: float) -> float | None:
        """Seconds to wait before the next start; None: there is none."""
        is_good = lived_s >= max(_GOOD_LIFE_S, _GOOD_LIFE_PER_START * start_s)
        self._num_short_lives = 0 if is_good else self._num_short_lives + 1
        if self._num_short_lives > self._max_restarts or not self._max_restarts:
            return None
        if self._num_short_lives <= 1:
            self._delay = 0.0
            return 0.0
        self._delay = min(2 * self._delay or _FIRST_DELAY_S, _LONGEST_DELAY_S)
        return self._delay
