"""Requests that a client holds back until an engine has a free slot. No I/O."""

from __future__ import annotations

import heapq

from asyncscale.client.stream import RequestStream

# Ended requests are left in the heap until they come up, or until they are this many and more than half of it.
_MAX_ENDED = 256


class HoldQueue:
    """Best priority first, then arrival. `len` and `num_tokens` (of their prompts) count those that have not ended."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, RequestStream]] = []
        self._held: set[RequestStream] = set()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def first(self) -> RequestStream:
        """Raises IndexError when there is none."""
        while self._heap[0][2] not in self._held:
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def push(self, request: RequestStream) -> None:
        heapq.heappush(self._heap, (request.priority, request.order, request))
        self._held.add(request)
        self.num_tokens += len(request.prompt_token_ids)

    def discard(self, request: RequestStream) -> None:
        """It was sent, or it ended. Does nothing when it is not held."""
        if request not in self._held:
            return
        self._held.discard(request)
        self.num_tokens -= len(request.prompt_token_ids)
        if not self._held:
            self._heap.clear()  # an idle client keeps no request alive
            return
        num_ended = len(self._heap) - len(self._held)
        if num_ended > max(_MAX_ENDED, len(self._held)):
            self._heap = [entry for entry in self._heap if entry[2] in self._held]
            heapq.heapify(self._heap)
