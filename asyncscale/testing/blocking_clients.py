"""The clients of one test that is no coroutine function: see `asyncscale.testing.clients`."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from asyncscale.blocking.client import AsyncScaleClient
from asyncscale.testing.clients import WatchedClient, settle


class BlockingScope:
    """::

        with BlockingScope() as scope:
            client = scope.start(watched_client)

    They are closed in the end; what they left behind is known after that.
    """

    def __init__(self) -> None:
        self.left_behind: list[str] = []
        self._stack = ExitStack()

    def start(self, client: WatchedClient) -> AsyncScaleClient:
        """A started client that runs `client` on a loop of its own."""
        blocking = _Blocking(client).start()
        self._stack.callback(self._end, blocking)
        return blocking

    def _end(self, client: _Blocking) -> None:
        self.left_behind = client.settle() + self.left_behind
        client.close(drain=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


class _Blocking(AsyncScaleClient):
    def __init__(self, client: WatchedClient) -> None:
        self._watched = client
        self._prepare(client)

    def settle(self) -> list[str]:
        """End all requests. Which were left behind?"""
        if self._closed:
            return self._watched.left_behind()
        background = self._running()
        left_behind = background.call(self._watched.left_behind)  # there: what was given up is aborted before
        background.run(settle(self._watched))
        return left_behind
