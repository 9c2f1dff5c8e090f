"""Engines that died and are started again, and for how long requests wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from asyncscale.errors import EngineDeadError


class Outages:
    """Calls `on_over` with the error of an engine that is not back `timeout` seconds after its death.

    ::

        outages.begin(error)            # of EngineDeadError.engine_id, which will return
        if engine_id in outages: ...    # to wait for it makes sense
        outages.end(engine_id)          # it is back, or never will be
    """

    def __init__(self, timeout: float, on_over: Callable[[EngineDeadError], None]) -> None:
        self._timeout = timeout
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def __contains__(self, engine_id: int) -> bool:
        return engine_id in self._timers

    def __len__(self) -> int:
        return len(self._timers)

    def begin(self, error: EngineDeadError) -> None:
        """The engine died. While it is out, a further death (of an attempt to start it) does not prolong the wait."""
        if error.engine_id not in self._timers:
            self._timers[error.engine_id] = self._loop.call_later(self._timeout, self._over, error)

    def end(self, engine_id: int) -> None:
        """Wait for the engine no longer. Does nothing when nobody does."""
        timer = self._timers.pop(engine_id, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Wait for none."""
        for engine_id in list(self._timers):
            self.end(engine_id)

    def _over(self, error: EngineDeadError) -> None:
        del self._timers[error.engine_id]
        self._on_over(
            EngineDeadError(
                f"{error.args[0]}, and was not back within {self._timeout:g} s",
                engine_id=error.engine_id,
                exit_code=error.exit_code,
                stderr_tail=error.stderr_tail,
            )
        )
