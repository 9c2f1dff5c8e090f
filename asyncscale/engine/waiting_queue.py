"""Requests that wait for a row and blocks: the best priority first, and within one, fair shares for every client."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter

from asyncscale.engine.request import Request


class WaitingQueue:
    """The next request is, among those of the best (lowest) priority, of the client that has the fewest running.

    So a client that floods delays itself. Between clients that have equally many, and within a client, the first to
    arrive goes first; a preempted request keeps its rank, and so returns to the front of its client's class.
    """

    def __init__(self) -> None:
        self._entries: dict[bytes, list[tuple[tuple[int, int], Request]]] = {}  # by client; none is empty
        self._num_running: Counter[bytes] = Counter()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def first(self) -> Request:
        if len(self._entries) == 1:
            (entries,) = self._entries.values()
            return entries[0][1]
        return min((entries[0][1] for entries in self._entries.values()), key=self._turn)

    def push(self, request: Request) -> None:
        insort(self._entries.setdefault(request.client, []), (request.rank, request))
        self._length += 1

    def pop(self) -> Request:
        """The first, which runs from now on, until `stopped` says that it does not."""
        request = self.first
        self._delete(request, 0)
        self._num_running[request.client] += 1
        return request

    def stopped(self, request: Request) -> None:
        """One that was popped runs no more."""
        self._num_running[request.client] -= 1
        if not self._num_running[request.client]:
            del self._num_running[request.client]

    def discard(self, request: Request) -> None:
        """Take the request out, if it is in."""
        entries = self._entries.get(request.client, [])
        index = bisect_left(entries, request.rank, key=lambda entry: entry[0])
        if index < len(entries) and entries[index][1] is request:
            self._delete(request, index)

    def _turn(self, request: Request) -> tuple[int, int, int]:
        return request.priority, self._num_running[request.client], request.order

    def _delete(self, request: Request, index: int) -> None:
        entries = self._entries[request.client]
        del entries[index]
        if not entries:
            del self._entries[request.client]
        self._length -= 1
