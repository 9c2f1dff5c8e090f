"""The owner's part in keeping its engines in tandem: hears of engines and clients, and tells them what is decided."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Hashable

from asyncscale.client.exceptions import fresh
from asyncscale.tandem.client import ClientWaves
from asyncscale.tandem.coordinator import CoordinatorWaves
from asyncscale.tandem.meeting import close_meeting, open_meeting
from asyncscale.tandem.messages import Broken, FromTandemEngine, GroupState, Met, Paused, Wake

logger = logging.getLogger(__name__)

# Who steps with an engine hears of its death some milliseconds before its owner does. So long the owner waits, lest the
# group be formed anew with the dead.
_DEATH_NOTICE_S = 0.1


class TandemHub:
    """CoordinatorWaves between the owner's engines and its clients, and the folders where generations meet::

        hub = TandemHub(num_engines, folder, tell_engines, tell_clients)
        hub.engine_joined(0)
        hub.on_wake(wake)                 # of a client
        async with hub.rest():
            ...                           # no engine computes

    folder: the private one of owner and engines. tell_engines, tell_clients: send all of them a message.
    """

    def __init__(
        self,
        num_engines: int,
        folder: str,
        tell_engines: Callable[[GroupState], None],
        tell_clients: Callable[[GroupState], None],
    ) -> None:
        self._waves = CoordinatorWaves(num_engines)
        self._own = ClientWaves()
        self._folder = folder
        self._tell_engines = tell_engines
        self._tell_clients = tell_clients
        self._met = 0  # the newest generation that a place to meet was made for
        self._formed = 0  # the newest generation that the engines are in
        self._waiters: set[asyncio.Future[None]] = set()
        self._breaking: asyncio.TimerHandle | None = None
        self._ended: Exception | None = None

    @property
    def state(self) -> GroupState:
        """What is decided now."""
        return self._waves.state

    # --- events

    def engine_joined(self, engine_id: int) -> None:
        """An engine is ready, for the first time or again."""
        self._decided(self._waves.engine_joined(engine_id))

    def engine_died(self, engine_id: int) -> None:
        """An engine is dead."""
        self._decided(self._waves.engine_died(engine_id))

    def on_report(self, report: FromTandemEngine) -> None:
        """An engine says that it has met the others, that it pauses, or that the others have left it."""
        match report:
            case Met(generation):
                self._formed = max(self._formed, generation)
                self._wake_waiters()
            case Paused():
                self._decided(self._waves.on_report(report))
            case Broken(generation):
                if self.state.whole and generation == self.state.generation and self._breaking is None:
                    self._breaking = asyncio.get_running_loop().call_later(_DEATH_NOTICE_S, self._on_broken, report)

    def on_wake(self, wake: Wake) -> None:
        """A client has sent a request to an engine that pauses, for all it knows."""
        self._decided(self._waves.on_wake(wake))

    def request_sent(self) -> None:
        """The owner itself has."""
        wake = self._own.request_sent()
        if wake is not None:
            self.on_wake(wake)

    def end(self, error: Exception) -> None:
        """The group will never be whole again, or nobody wants it any more: who waits for rest gets this error."""
        self._ended = error
        self._stop_breaking()
        self._wake_waiters()

    # --- rest

    async def hold(self, holder: Hashable) -> None:
        """Return when all engines are at rest, with or without work; until `release` they stay so.

        Raises the error that `end` was called with.
        """
        self._decided(self._waves.hold(holder))
        # Until they have met, engines may be in a step of an earlier generation, which fails, and answer in between.
        while not (self._waves.at_rest and self._formed == self.state.generation):
            if self._ended is not None:
                raise fresh(self._ended)
            changed = asyncio.get_running_loop().create_future()
            self._waiters.add(changed)
            try:
                await changed
            finally:
                self._waiters.discard(changed)

    def release(self, holder: Hashable) -> None:
        """This holder's part in that is over."""
        self._decided(self._waves.release(holder))

    @contextlib.asynccontextmanager
    async def rest(self) -> AsyncIterator[None]:
        """Within it, no engine computes: whatever is done to all of them is done between the same two steps."""
        holder = object()
        try:
            await self.hold(holder)
            yield
        finally:
            self.release(holder)

    # --- what follows

    def _on_broken(self, report: Broken) -> None:
        self._breaking = None
        self._decided(self._waves.on_report(report))

    def _stop_breaking(self) -> None:
        if self._breaking is not None:
            self._breaking.cancel()
            self._breaking = None

    def _decided(self, state: GroupState | None) -> None:
        if state is None:
            return
        if not state.whole:
            self._stop_breaking()
        if self._met and (not state.whole or state.generation != self._met):
            close_meeting(self._folder, self._met)
            self._met = 0
        if state.whole and state.generation != self._met:
            open_meeting(self._folder, state.generation)
            self._met = state.generation
            logger.debug("the engines form a group, for the %d. time", state.generation)
        self._own.on_group_state(state)
        self._tell_engines(state)
        self._tell_clients(state)
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()
