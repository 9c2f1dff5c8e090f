"""A client's way from its start to its end: once, on one event loop, whatever hits it midway."""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, Protocol, cast

from asyncscale.client.misuse import not_on_its_loop
from asyncscale.client.state import State, wrong_state
from asyncscale.errors import ClientClosedError

logger = logging.getLogger(__name__)


class Draining(Protocol):
    """How the client that closes lets its requests finish first."""

    async def drain(self) -> None:
        """Return when they have; accept no more meanwhile."""

    @property
    def num_undone(self) -> int:
        """How many have not finished."""


class Life:
    """The states of a client, and the moves between them.

    ::

        await life.start(begin)                       # begin: acquires, and puts its releases into life.cleanup
        life.run(finalizer, abandon)
        life.check_usable()                           # before each use
        await life.close(draining, timeout=60.0)

    cleanup: releases in reverse order what was acquired: requests and connections, engines, sockets' context.
    """

    def __init__(self) -> None:
        self.state = State.NEW
        self.cleanup = AsyncExitStack()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._owner_pid = 0  # of the process that started it, unlike forks of that
        self._starter: asyncio.Task[Any] | None = None  # who awaits `start`, until it is over
        self._closed_while_starting = False
        self._closing: asyncio.Task[None] | None = None
        self._may_drain = True
        self._drain_limit: asyncio.Timeout | None = None  # while it drains
        self._finalizer: weakref.finalize[..., Any] | None = None  # while it runs
        self._abandon: Callable[[], None] = lambda: None

    # --- start

    async def start(self, begin: Callable[[], Awaitable[None]]) -> None:
        """Run `begin`. When that fails, or the client is closed meanwhile, all is released before this raises."""
        if self.state is not State.NEW:
            raise wrong_state(self.state, "start")
        self.state = State.STARTING
        self.loop = asyncio.get_running_loop()
        self._owner_pid = os.getpid()
        self._starter = starter = cast("asyncio.Task[Any]", asyncio.current_task())
        num_cancels = starter.cancelling()
        try:
            await begin()
        except BaseException:
            if self._closing is None:
                self._begin_closing(self._shut_down())
            await self.wait_closed()
            if self._closed_while_starting and starter.uncancel() <= num_cancels:
                raise ClientClosedError("the client was closed while it started") from None
            raise
        finally:
            self._starter = None
        self.state = State.RUNNING

    def run(self, finalizer: weakref.finalize[..., Any], abandon: Callable[[], None]) -> None:
        """It has started. finalizer: ends a client that is forgotten. abandon: ends it without its event loop."""
        self._finalizer = finalizer
        self._abandon = abandon

    # --- use

    def check_usable(self) -> None:
        """Raises ClientStateError when the client cannot be used now, or not here."""
        if self.state is not State.RUNNING:
            raise wrong_state(self.state, "use")
        self._check_loop()

    def check_running(self) -> None:
        """Raises ClientStateError when the client cannot be used now, in whatever thread of its process."""
        if self.state is not State.RUNNING:
            raise wrong_state(self.state, "use")
        if os.getpid() != self._owner_pid:
            raise not_on_its_loop("this client", self.loop, is_fork=True)

    def _check_loop(self) -> None:
        if asyncio._get_running_loop() is not self.loop:
            raise not_on_its_loop("this client", self.loop, is_fork=os.getpid() != self._owner_pid)

    # --- close

    @property
    def is_closing(self) -> bool:
        """Whether somebody closes it or has closed it, after a start."""
        return self._closing is not None

    async def close(self, draining: Draining | None, timeout: float | None) -> None:
        """Release everything; with `draining`, let requests finish first, for at most `timeout` seconds.

        The first call decides, but one without draining ends a drain, as cancelling the first does.
        """
        if self.state is State.NEW:
            self.state = State.CLOSED
            return
        if self.state is State.CLOSED or os.getpid() != self._owner_pid:
            return
        if self.loop is not None and self.loop.is_closed():
            await asyncio.to_thread(self._end_without_loop)
            return
        self._check_loop()
        if self._closing is not None:
            if draining is None:
                self._stop_draining()
            await self.wait_closed()
            return
        if self._starter is not None:
            draining = None
            self._closed_while_starting = True
            self._starter.cancel()
        self._begin_closing(self._close(draining, timeout))
        try:
            await self.wait_closed()
        except asyncio.CancelledError:
            self._stop_draining()
            raise

    async def wait_closed(self) -> None:
        """Return when the client is closed; it goes on being closed when who waits here is cancelled."""
        if self._closing is None:
            return
        await asyncio.wait([self._closing])
        error = None if self._closing.cancelled() else self._closing.exception()
        if isinstance(error, Exception):  # else a Ctrl-C that hit the closing: it has been raised already, by the loop
            raise error

    def _begin_closing(self, closing: Coroutine[Any, Any, None]) -> None:
        self.state = State.CLOSING
        self._closing = asyncio.ensure_future(closing)
        self._closing.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _stop_draining(self) -> None:
        self._may_drain = False  # if it has not begun to
        if self._drain_limit is not None and not self._drain_limit.expired():
            self._drain_limit.reschedule(0.0)

    async def _close(self, draining: Draining | None, timeout: float | None) -> None:
        try:
            if draining is not None and self._may_drain:
                await self._drain(draining, timeout)
        finally:
            self._drain_limit = None
            await self._shut_down()

    async def _drain(self, draining: Draining, timeout: float | None) -> None:
        try:
            async with asyncio.timeout(timeout) as self._drain_limit:
                await draining.drain()
        except TimeoutError:
            if self._drain_limit is None or self._drain_limit.when() == 0.0:
                return  # somebody does not want to wait for it
            logger.warning("closing: %d requests did not finish within %g s", draining.num_undone, timeout)

    async def _shut_down(self) -> None:
        try:
            await self.cleanup.aclose()
        finally:
            self._set_closed()

    def _end_without_loop(self) -> None:
        self._abandon()
        self._set_closed()

    def _set_closed(self) -> None:
        self.state = State.CLOSED
        if self._finalizer is not None:
            self._finalizer.detach()
