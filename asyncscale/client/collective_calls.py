"""Calls of engines' methods, of all clients: in one order, and where that is asked for between the same two steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

import msgspec

from asyncscale import messages
from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.tandem_hub import TandemHub

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
        self.own_methods: dict[str, Callable[[Sequence[msgspec.Raw]], Coroutine[Any, Any, Results]]] = {}

    def start(self, method: str, args: Sequence[msgspec.Raw], *, lockstep: bool = False) -> Awaitable[Results]:
        """Run a registered method once on every engine; results in engine order.

        lockstep: while none of them computes. In tandem, that is so of a pause, too: an engine that pauses on its own
        would have the others wait for it in the middle of a step.
        """
        if method in self.own_methods:
            return self._run(self.own_methods[method](args))
        if lockstep:
            return self._run(self._call_in_lockstep(method, args))
        if self._tandem is not None and method == "pause":
            return self._run(self._pause(self._tandem, args))
        if self._tandem is not None and method == "resume":
            return self._run(self._resume(self._tandem, args))
        return self._dispatcher.call(method, args)

    def close(self) -> None:
        """Wait for nothing any more."""
        for task in self._tasks:
            task.cancel()

    def _run(self, calling: Coroutine[Any, Any, Results]) -> Awaitable[Results]:
        task = asyncio.ensure_future(calling)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return asyncio.shield(task)

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
