"""Requests that wait for a row and blocks, best first."""

from __future__ import annotations

from bisect import bisect_left, insort

from asyncscale.engine.request import Request


class WaitingQueue:
    """Ordered by `Request.rank`: priority (lower runs first), then arrival.

    A preempted request keeps its rank, and so returns to the front of its class.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[int, int], Request]] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def first(self) -> Request:
        return self._entries[0][1]

    def push(self, request: Request) -> None:
        insort(self._entries, (request.rank, request))

    def pop(self) -> Request:
        return self._entries.pop(0)[1]

    def discard(self, request: Request) -> None:
        """Take the request out, if it is in."""
        index = bisect_left(self._entries, request.rank, key=lambda entry: entry[0])
        if index < len(self._entries) and self._entries[index][1] is request:
            del self._entries[index]
