"""How much one client may leave waiting, and who waits until it may leave more. No I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from asyncscale.client.hold_queue import HoldQueue
from asyncscale.client.stream import RequestStream
from asyncscale.errors import OverloadedError

_CURE = ". `submit` waits its turn"


class Admission:
    """Limits of what waits, and the lines of those who wait to be among it::

        admission.check(engine, num_tokens)     # raises OverloadedError
        future = admission.wait(request)        # done when it is no longer in its line
        while (request := admission.next(has_room)) is not None:
            ...                                 # its turn has come

    Who comes later never takes the place of one who waits. Requests that are pinned to an engine wait there, not in the
    queue, and have a line of their own for each: max_requests holds for it alone. num_waiting_at: how many that are.
    """

    def __init__(
        self,
        queue: HoldQueue,
        max_requests: int | None,
        max_tokens: int | None,
        num_waiting_at: Callable[[int], int],
    ) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._queue = queue
        self._num_waiting_at = num_waiting_at
        self._lines: dict[int | None, HoldQueue] = {}  # by the engine that they are pinned to; none is empty
        self._futures: dict[RequestStream, asyncio.Future[None]] = {}

    @property
    def is_limited(self) -> bool:
        return self._max_requests is not None or self._max_tokens is not None

    @property
    def waiting(self) -> list[RequestStream]:
        """Those in line."""
        return list(self._futures)

    def __len__(self) -> int:
        return len(self._futures)

    def check(self, engine: int | None, num_tokens: int) -> None:
        """Raises OverloadedError when a request with so many prompt tokens may not be left waiting now."""
        if engine in self._lines:
            in_line = len(self._lines[engine])
            raise OverloadedError(f"{in_line} requests of this client wait for a place in its queue already{_CURE}")
        reason = self._why_not(engine, num_tokens)
        if reason is not None:
            raise OverloadedError(f"{reason}{_CURE}")

    def wait(self, request: RequestStream) -> asyncio.Future[None]:
        """Join the line."""
        self._lines.setdefault(request.pinned_engine, HoldQueue()).push(request)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures[request] = future
        return future

    def leave(self, request: RequestStream) -> None:
        """Out of the line, with a place or without. Does nothing when it is not in it."""
        future = self._futures.pop(request, None)
        if future is None:
            return
        line = self._lines[request.pinned_engine]
        line.discard(request)
        if not line:
            del self._lines[request.pinned_engine]
        if not future.done():
            future.set_result(None)

    def next(self, has_room: bool) -> RequestStream | None:
        """The first of a line, if there is a place for it. has_room: one that is not pinned need not be held back."""
        for engine, line in self._lines.items():
            request = line.first
            if (has_room and engine is None) or self._why_not(engine, len(request.prompt_token_ids)) is None:
                self.leave(request)
                return request
        return None

    def _why_not(self, engine: int | None, num_tokens: int) -> str | None:
        num_requests = len(self._queue) if engine is None else self._num_waiting_at(engine)
        if self._max_requests is not None and num_requests >= self._max_requests:
            where = "while every engine is full" if engine is None else f"at engine {engine}"
            return f"{num_requests} requests of this client wait {where}: max_queued_requests is {self._max_requests}"
        all_tokens = self._queue.num_tokens + num_tokens
        if engine is None and self._max_tokens is not None and all_tokens > self._max_tokens:
            return (
                f"with this one the prompts of this client that wait while every engine is full have {all_tokens} "
                f"tokens or more: max_queued_tokens is {self._max_tokens}"
            )
        return None
