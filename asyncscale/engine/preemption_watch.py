"""Says when the KV cache is too small for what runs: each preempted request is computed again from its first token."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

# A few preemptions are the price of a full cache. So many within so long are too many, which is said once in so long.
_MANY = 10
_WINDOW_S = 60.0


class PreemptionWatch:
    """Counts preemptions, and warns of many at once.

    ::

        watch.add(len(preempted), now)        # now: seconds, of any clock
    """

    def __init__(self) -> None:
        self._count = 0  # in this window
        self._window_end = float("-inf")
        self._has_warned = False

    def add(self, count: int, now: float) -> None:
        """So many requests were preempted."""
        if now >= self._window_end:
            self._count = 0
            self._window_end = now + _WINDOW_S
            self._has_warned = False
        self._count += count
        if self._count >= _MANY and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the KV cache is too small for what runs at once: within %.0f s, %d times a request lost its blocks to "
                "another and must be computed again. Raise kv_cache_memory_fraction, or lower max_num_seqs",
                _WINDOW_S - (self._window_end - now),
                self._count,
            )
