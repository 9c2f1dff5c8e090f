"""Calls of engines' methods, of all clients: in one order, and where that is asked for between the same two steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from typing import Any

import msgspec

from asyncscale import messages
from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.exceptions import fresh
from asyncscale.client.tandem_hub import TandemHub
from asyncscale.errors import EngineError

Results = list[messages.EngineResult]


class CollectiveCalls:
    """The owner's calls, and those that attached clients ask it for::

        results = await calls.start("kv_cache_stats", [])                # has been sent when `start` returns
        results = await calls.start("reset_prefix_cache", [], lockstep=True)

    dispatcher: has the connections that calls go over. tandem: of engines that step together; others are held one by
    one. Who is cancelled while it waits has no influence on what it asked for.
    """

    def __init__(self, dispatcher: Dispatcher, tandem: TandemHub | None) -> None:
        self._dispatcher = dispatcher
        self._tandem = tandem
        self._tasks: set[asyncio.Task[Results]] = set()
        self._lockstep = asyncio.Lock()
        self._ended: Exception | None = None

    def start(self, method: str, args: Sequence[msgspec.Raw], *, lockstep: bool = False) -> Awaitable[Results]:
        """Run a registered method once on every engine; results in engine order.

        lockstep: while none of them computes. In tandem, that is so of a pause, too, and until it ends no wave begins:
        engines that pause on their own would keep each other busy with dummy batches.
        """
        if self._tandem is not None and method == "pause":
            return self._run(self._pause(self._tandem, args))
        if self._tandem is not None and method == "resume":
            return self._run(self._resume(self._tandem, args))
        if lockstep:
            return self._run(self._call_in_lockstep(method, args))
        return self._dispatcher.call(method, args)

    def close(self, error: Exception) -> None:
        """Wait for nothing any more: calls that have not been sent end with this error."""
        self._ended = error
        if self._tandem is not None:
            self._tandem.end(error)

    def _run(self, calling: Coroutine[Any, Any, Results]) -> Awaitable[Results]:
        task = asyncio.ensure_future(_results(calling))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return asyncio.shield(task)

    async def _call_in_lockstep(self, method: str, args: Sequence[msgspec.Raw]) -> Results:
        async with self._turn(), self._rest():
            return await self._dispatcher.call(method, args)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Within it, nobody else has the engines rest or go on."""
        async with self._lockstep:
            if self._ended is not None:
                raise fresh(self._ended)
            yield

    @contextlib.asynccontextmanager
    async def _rest(self) -> AsyncIterator[None]:
        """Within it, no engine computes."""
        if self._tandem is not None:
            async with self._tandem.rest():
                yield
            return
        try:
            await self._dispatcher.call("_hold_steps", [])
            yield
        finally:
            await self._dispatcher.call("_release_steps", [])

    async def _pause(self, tandem: TandemHub, args: Sequence[msgspec.Raw]) -> Results:
        async with self._turn():
            await tandem.hold("pause")
            return await self._dispatcher.call("pause", args)

    async def _resume(self, tandem: TandemHub, args: Sequence[msgspec.Raw]) -> Results:
        async with self._turn():
            results = await self._dispatcher.call("resume", args)
            tandem.release("pause")
            return results


async def _results(calling: Coroutine[Any, Any, Results]) -> Results:
    """Of a call, also of one that no engine has heard of, as there will never be a group again."""
    try:
        return await calling
    except EngineError as error:
        return [messages.EngineResult(error.engine_id, error=str(error.args[0]), died=True)]
