"""Calls of engines' methods, of all clients: in one order, and where that is asked for between the same two steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
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
    one. Who is cancelled while it waits has no influence on what it asked for. own_methods: what the owner does itself,
    for all engines.
    """

    def __init__(self, dispatcher: Dispatcher, tandem: TandemHub | None) -> None:
        self._dispatcher = dispatcher
        self._tandem = tandem
        self._tasks: set[asyncio.Task[Results]] = set()
        self._lockstep = asyncio.Lock()
        self._ended: Exception | None = None
        self.own_methods: dict[str, Callable[[Sequence[msgspec.Raw]], Coroutine[Any, Any, Results]]] = {}

    def start(self, method: str, args: Sequence[msgspec.Raw], *, lockstep: bool = False) -> Awaitable[Results]:
        """Run a registered method once on every engine; results in engine order.

        lockstep: while none of them computes. In tandem, that is so of a pause, too, and until it ends no wave begins:
        engines that pause on their own would keep each other busy with dummy batches.
        """
        if method in self.own_methods:
            return self._run(self.own_methods[method](args))
        if self._tandem is not None and method == "pause":
            return self._run(self._pause(self._tandem, args))
        if self._tandem is not None and method == "resume":
            return self._run(self._resume(self._tandem, args))
        if lockstep:
            return self._run(self._call_in_lockstep(method, args))
        return self._dispatcher.call(method, args)

    def close(self, error: Exception) -> None:
        """Calls that have no results yet end with this error."""
        self._ended = error
        for task in self._tasks:
            task.cancel()
        if self._tandem is not None:
            self._tandem.end(error)

    def _run(self, calling: Coroutine[Any, Any, Results]) -> Awaitable[Results]:
        task = asyncio.ensure_future(calling)
        self._tasks.add(task)
        answer: asyncio.Future[Results] = task.get_loop().create_future()
        task.add_done_callback(lambda task: self._answer(answer, task))
        return answer

    def _answer(self, answer: asyncio.Future[Results], task: asyncio.Task[Results]) -> None:
        self._tasks.discard(task)
        error = self._ended if task.cancelled() else task.exception()
        if answer.done():  # who waited for it was cancelled
            return
        if isinstance(error, EngineError):  # no engine was called, as the group will never be whole again
            answer.set_result([messages.EngineResult(error.engine_id, error=str(error.args[0]), died=True)])
        elif error is not None:
            answer.set_exception(fresh(error))
        else:
            answer.set_result(task.result())

    async def _call_in_lockstep(self, method: str, args: Sequence[msgspec.Raw]) -> Results:
        async with self._lockstep, self._rest():
            return await self._dispatcher.call(method, args)

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
        async with self._lockstep:
            await tandem.hold("pause")
            return await self._dispatcher.call("pause", args)

    async def _resume(self, tandem: TandemHub, args: Sequence[msgspec.Raw]) -> Results:
        async with self._lockstep:
            results = await self._dispatcher.call("resume", args)
            tandem.release("pause")
            return results
