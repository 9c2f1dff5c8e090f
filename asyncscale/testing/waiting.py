"""Wait for what no event tells of: bounded, and what did not come true is said."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from asyncscale.client.policies import EngineLoad
    from asyncscale.client.roster import EngineHealth

_INTERVAL_S = 0.002


class HasHealth(Protocol):
    """A client, asynchronous or blocking, or the value of the fixture `asyncscale_engines`."""

    def health(self) -> tuple[EngineHealth, ...]: ...


class HasLoads(Protocol):
    """A client, asynchronous or blocking."""

    def engine_loads(self) -> tuple[EngineLoad, ...]: ...


async def wait_until(
    condition: Callable[[], object | Awaitable[object]],
    what: str | Callable[[], str] = "the condition holds",
    *,
    timeout: float = 10.0,
) -> None:
    """Return when `condition`, a function or a coroutine function, returns something true.

    ::

        await wait_until(lambda: client.engine_loads()[0].waiting == 0, "nobody waits")

    timeout: seconds. Raises TimeoutError, which says what did not come true.
    """
    deadline = time.monotonic() + timeout
    while True:
        holds = condition()
        if isinstance(holds, Awaitable):
            holds = await holds
        if holds:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"waited {timeout:g} s, and it is still not so that {what() if callable(what) else what}"
            )
        await asyncio.sleep(_INTERVAL_S)


async def wait_idle(client: HasLoads, *, timeout: float = 10.0) -> None:
    """Return when no engine has a request aboard, of any client. Raises TimeoutError after so many seconds."""

    def what() -> str:
        counts = ", ".join(f"{load.in_flight} at engine {load.engine_id}" for load in client.engine_loads())
        return f"the engines are idle: requests in flight are {counts}"

    await wait_until(lambda: not any(load.in_flight for load in client.engine_loads()), what, timeout=timeout)


async def wait_engines_ready(client: HasHealth, *, timeout: float = 30.0) -> None:
    """Return when every engine takes requests. Raises TimeoutError after so many seconds."""

    def what() -> str:
        states = (
            f"engine {engine.engine_id} is {engine.state} ({engine.last_error})"
            for engine in client.health()
            if engine.state != "ready"
        )
        return f"all engines are ready: {', '.join(states)}"

    await wait_until(lambda: all(engine.state == "ready" for engine in client.health()), what, timeout=timeout)
