"""The clients of one test: made for it, looked at when it ends, and closed."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

from asyncscale.client.client import AsyncScaleClient
from asyncscale.client.generation import ForgottenError, Generation
from asyncscale.client.preparation import Preparation
from asyncscale.client.stream import RequestStream
from asyncscale.config import ModelSource
from asyncscale.messages import EngineFacts
from asyncscale.tokenization.codec import TextCodec

_SETTLE_TIMEOUT_S = 1.0
_MANY = 1000


class WatchedClient(AsyncScaleClient):
    """A client that knows which requests were left behind, and seeds those that have no seed alike in each test.

    codec: that of the engines' model, if somebody has loaded it already: set it before `start`.
    """

    def _prepare(self, *args: Any) -> None:
        super()._prepare(*args)
        self.codec: TextCodec | None = None
        self._watched: list[RequestStream] = []
        self._next_cleaning = _MANY

    def generate(self, *args: Any, **options: Any) -> Generation:
        return self._watch(super().generate(*args, **options))

    async def submit(self, *args: Any, **options: Any) -> Generation:
        return self._watch(await super().submit(*args, **options))

    def chat(self, *args: Any, **options: Any) -> Generation:
        return self._watch(super().chat(*args, **options))

    def left_behind(self) -> list[str]:
        """The ids of the requests that run, and of those that nobody ever read and nobody can."""
        return [stream.request_id for stream in self._watched if _is_left_behind(stream)]

    async def _load_codec(self, source: ModelSource) -> TextCodec:
        if self.codec is None:
            self.codec = await super()._load_codec(source)
        return self.codec

    def _make_preparation(self, codec: TextCodec, facts: EngineFacts) -> Preparation:
        return Preparation(codec, facts, partial(random.Random(0).getrandbits, 64))

    def _watch(self, generation: Generation) -> Generation:
        if len(self._watched) >= self._next_cleaning:  # so that a test may have very many requests
            self._watched = [stream for stream in self._watched if _is_left_behind(stream)]
            self._next_cleaning = max(_MANY, 2 * len(self._watched))
        self._watched.append(generation._stream)
        return generation


def _is_left_behind(stream: RequestStream) -> bool:
    return not stream.done or isinstance(stream.error, ForgottenError)


class ClientScope:
    """The clients of one test, on the loop in which it is entered::

        async with ClientScope(client) as scope:
            private = await scope.start(another)

    client: one that is started first, if any. They are closed in the end; what they left behind is known after that,
    too.
    """

    def __init__(self, client: WatchedClient | None = None) -> None:
        self._first = client
        self._started: list[WatchedClient] = []
        self._left_behind: list[str] | None = None  # once it is over

    @property
    def client(self) -> WatchedClient:
        """The one that it was made with."""
        assert self._first is not None
        return self._first

    async def start(self, client: WatchedClient) -> WatchedClient:
        """Start it, and close it in the end."""
        await client.start()
        self._started.append(client)
        return client

    def left_behind(self) -> list[str]:
        """The ids of requests that nobody finished, read or aborted."""
        if self._left_behind is None:
            return [request_id for client in self._started for request_id in client.left_behind()]
        return self._left_behind

    async def __aenter__(self) -> Self:
        if self._first is not None:
            await self.start(self._first)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left_behind = self.left_behind()
        async with AsyncExitStack() as stack:
            for client in self._started:
                stack.push_async_callback(client.close, drain=False)
                stack.push_async_callback(settle, client)


async def settle(client: AsyncScaleClient) -> None:
    """When this returns, the engines have forgotten the client's requests, and the prompts of all that they had."""
    with suppress(Exception):  # of engines that are dead or stopped, or gone with their owner
        # Tasks that the test left behind end as their loop would end them, and not with an error that nobody takes.
        client._dispatcher.abort_all(asyncio.CancelledError("the test is over"))
        async with asyncio.timeout(_SETTLE_TIMEOUT_S):
            await client.collective_rpc("reset_prefix_cache")  # done by each after the aborts before it
