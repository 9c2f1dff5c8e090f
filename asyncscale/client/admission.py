"""How much one client may hold back, and who waits until it may hold more. No I/O."""

from __future__ import annotations

import asyncio

from asyncscale.client.hold_queue import HoldQueue
from asyncscale.client.stream import RequestStream
from asyncscale.errors import OverloadedError


class Admission:
    """Limits of a hold queue, and the line of those who wait to get into it::

        admission.check(num_tokens)             # raises OverloadedError
        future = admission.wait(request)        # done when it is no longer in the line
        while (request := admission.next(has_room)) is not None:
            ...                                 # its turn has come

    Who comes later never takes the place of one who waits.
    """

    def __init__(self, queue: HoldQueue, max_requests: int | None, max_tokens: int | None) -> None:
        self.max_requests = max_requests
        self._max_tokens = max_tokens
        self._queue = queue
        self._line = HoldQueue()
        self._futures: dict[RequestStream, asyncio.Future[None]] = {}

    @property
    def is_limited(self) -> bool:
        return self.max_requests is not None or self._max_tokens is not None

    @property
    def line(self) -> list[RequestStream]:
        """Those who wait."""
        return list(self._futures)

    def __len__(self) -> int:
        return len(self._line)

    def check(self, num_tokens: int) -> None:
        """Raises OverloadedError when a request with so many prompt tokens may not be held back now."""
        if self._line:
            raise OverloadedError(f"{len(self._line)} requests of this client wait for a place in its queue already")
        reason = self._why_not(num_tokens)
        if reason is not None:
            raise OverloadedError(f"every engine is full, and {reason}")

    def wait(self, request: RequestStream) -> asyncio.Future[None]:
        """Join the line."""
        self._line.push(request)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures[request] = future
        return future

    def leave(self, request: RequestStream) -> None:
        """Out of the line, with a place or without. Does nothing when it is not in it."""
        future = self._futures.pop(request, None)
        if future is None:
            return
        self._line.discard(request)
        if not future.done():
            future.set_result(None)

    def next(self, has_room: bool) -> RequestStream | None:
        """The first of the line, if there is a place for it. has_room: it need not be held back at all."""
        if not self._line:
            return None
        request = self._line.first
        if not has_room and self._why_not(len(request.prompt_token_ids)) is not None:
            return None
        self.leave(request)
        return request

    def _why_not(self, num_tokens: int) -> str | None:
        num_requests, all_tokens = len(self._queue), self._queue.num_tokens + num_tokens
        if self.max_requests is not None and num_requests >= self.max_requests:
            return f"{num_requests} requests of this client wait: max_queued_requests is {self.max_requests}"
        if self._max_tokens is not None and all_tokens > self._max_tokens:
            return (
                f"with this one the prompts of this client that wait have {all_tokens} tokens or more: "
                f"max_queued_tokens is {self._max_tokens}"
            )
        return None
