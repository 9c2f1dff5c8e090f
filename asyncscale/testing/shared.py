"""The engines that all tests of a session share, on an event loop of their own: tests' loops come and go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from asyncscale.background import BackgroundLoop
from asyncscale.client.engines import OwnedEngines
from asyncscale.client.roster import EngineHealth
from asyncscale.testing.clients import WatchedClient
from asyncscale.testing.faults import is_stopped, resume_engine
from asyncscale.testing.settings import Settings
from asyncscale.testing.waiting import wait_engines_ready, wait_until

# Sets of engines that run side by side; of more, those go that were used least recently.
_MAX_SETS = 3
# An engine that a test killed is back in a fraction of that, unless tests do nothing else; a new one is as good.
_RESTORE_TIMEOUT_S = 5.0


class SharedEngines(str):
    """The address of engines that tests share, as `AsyncScaleClient.attach` takes it.

    ::

        async with AsyncScaleClient.attach(asyncscale_engines) as client: ...
    """

    _owner: WatchedClient
    _loop: BackgroundLoop

    @classmethod
    def of(cls, owner: WatchedClient, loop: BackgroundLoop) -> SharedEngines:
        engines = cls(owner.address)
        engines._owner, engines._loop = owner, loop
        return engines

    @property
    def address(self) -> str:
        return str(self)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """In other processes, it is the address and nothing else."""
        return str, (str(self),)

    def health(self) -> tuple[EngineHealth, ...]:
        """How every engine is: see `AsyncScaleClient.health`."""
        return self._loop.call(self._owner.health)

    def attach(self) -> WatchedClient:
        """A client of these engines, not started."""
        client = WatchedClient.attach(self)
        client.codec = self._owner.codec
        return client


@dataclass(eq=False)
class _Set:
    """Engines with equal settings. starting: done when they are ready. num_holders: fixtures that told the address."""

    settings: Settings
    owner: WatchedClient
    starting: Future[object]
    num_holders: int = 0


class EnginePool:
    """Starts engines when they are first asked for, and ends all of them with `close`. Blocks; of one thread::

    address = pool.acquire(settings)

    """

    def __init__(self) -> None:
        self._loop: BackgroundLoop | None = None
        self._sets: list[_Set] = []  # the one that was used last comes last

    def acquire(self, settings: Settings) -> SharedEngines:
        """Engines with these settings that are ready for a test, whatever the one before it did to them.

        Raises ModelLoadError and EngineStartError.
        """
        return self._address(self._acquire(settings))

    @contextlib.contextmanager
    def hold(self, settings: Settings) -> Iterator[SharedEngines]:
        """Like `acquire`; and meanwhile, these are not ended to make room for others."""
        held = self._acquire(settings)
        held.num_holders += 1
        try:
            yield self._address(held)
        finally:
            held.num_holders -= 1

    def close(self) -> None:
        """End all engines."""
        while self._sets:
            self._end(self._sets[-1])
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _acquire(self, settings: Settings) -> _Set:
        loop = self._running_loop()
        found = next((one for one in self._sets if one.settings == settings), None)
        if found is not None and found.starting.done() and not self._is_usable(found):
            self._end(found)
            found = None
        if found is None:
            self._make_room()
            owner = settings.client()
            found = _Set(settings, owner, loop.submit(owner.start()))
        else:
            self._sets.remove(found)
        self._sets.append(found)
        found.starting.result()  # a test that times out here leaves it to the next one to wait for the rest
        return found

    def _is_usable(self, shared: _Set) -> bool:
        if shared.starting.cancelled() or shared.starting.exception() is not None:
            return False
        if _has_other_weights(shared.owner):
            return False
        loop = self._running_loop()
        return loop.call(_is_good, shared.owner) or loop.run(_restore(shared.owner))

    def _make_room(self) -> None:
        unused = [one for one in self._sets if not one.num_holders]
        for one in unused[: max(0, len(self._sets) - _MAX_SETS + 1)]:
            self._end(one)

    def _end(self, ended: _Set) -> None:
        self._sets.remove(ended)
        with contextlib.suppress(Exception):  # of a start that is cancelled now
            self._running_loop().run(ended.owner.close(drain=False))

    def _address(self, shared: _Set) -> SharedEngines:
        return SharedEngines.of(shared.owner, self._running_loop())

    def _running_loop(self) -> BackgroundLoop:
        if self._loop is None:
            self._loop = BackgroundLoop("asyncscale-testing")
        return self._loop


def _has_other_weights(owner: WatchedClient) -> bool:
    """Whether a test changed them: nothing brings those of the start back."""
    engines = owner._engines
    return isinstance(engines, OwnedEngines) and engines.weight_version > 0


def _is_good(owner: WatchedClient) -> bool:
    return all(engine.state == "ready" and not is_stopped(engine) for engine in owner.health()) and all(
        load.accepting for load in owner.engine_loads()
    )


async def _restore(owner: WatchedClient) -> bool:
    """Undo what can be undone of what a test did. Whether that was all."""
    try:
        async with asyncio.timeout(_RESTORE_TIMEOUT_S):
            for engine in owner.health():
                await resume_engine(owner, engine.engine_id)
            await wait_engines_ready(owner)
            await owner.collective_rpc("resume")
            await wait_until(lambda: _is_good(owner), "the engines accept requests")
    except Exception:
        return False
    return True
