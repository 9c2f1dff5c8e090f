"""Do to engines and clients what happens to them in production::

    await kill_engine(client, 0)           # as when memory runs out
    await hang_engine(client, 0)           # it is found out and replaced, unless resume_engine comes first
    async with slow_engine(client, 0, factor=4): ...
    await cut_client(client)               # as a network that breaks does

Engines are those of the client's host, whoever owns them. What follows is in the README, under "What happens when".
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from asyncscale.client.child_process import activity
from asyncscale.testing.waiting import HasHealth, wait_until

if TYPE_CHECKING:
    from asyncscale.client.client import AsyncScaleClient
    from asyncscale.client.roster import EngineHealth

_NOTICE_TIMEOUT_S = 10.0
# Far below what a client minds, and far above what a signal costs.
_SLOW_PERIOD_S = 0.02


async def kill_engine(client: HasHealth, engine_id: int) -> None:
    """Kill the engine's process, and return when `client` knows: its requests are on their way to another engine, or
    wait until this one is back."""
    before = engine_health(client, engine_id)
    os.kill(_pid(before), signal.SIGKILL)

    def noticed() -> bool:
        now = engine_health(client, engine_id)
        return now.state != "ready" or now.restarts != before.restarts

    await wait_until(noticed, f"the client knows that engine {engine_id} died", timeout=_NOTICE_TIMEOUT_S)


async def hang_engine(client: HasHealth, engine_id: int) -> None:
    """Stop the engine's process, and return when it does nothing more.

    Its owner finds that out after a tenth of its hang_timeout, and replaces the process.
    """
    pid = _pid(engine_health(client, engine_id))
    os.kill(pid, signal.SIGSTOP)
    await wait_until(lambda: activity(pid)[0] in ("T", None), f"engine {engine_id} is stopped")


async def resume_engine(client: HasHealth, engine_id: int) -> None:
    """Let an engine go on that `hang_engine` stopped. Does nothing when it runs, or is dead."""
    pid = engine_health(client, engine_id).pid
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def slow_engine(client: HasHealth, engine_id: int, *, factor: float = 4.0) -> AsyncIterator[None]:
    """Meanwhile, the engine's process runs one `factor`th of the time.

    That is by stopping it again and again from the event loop of the test, which therefore must not block for long.
    """
    if not factor >= 1:
        raise ValueError(f"factor must be at least 1, got {factor!r}")
    pid = _pid(engine_health(client, engine_id))
    throttling = asyncio.create_task(_throttle(pid, factor))
    try:
        yield
    finally:
        throttling.cancel()
        await asyncio.wait([throttling])


async def cut_client(client: AsyncScaleClient) -> None:
    """Break the client's connections to all engines, and return when it has new ones.

    The engines drop what the client had there; it sends that again, and goes on behind the tokens that had arrived.
    """
    broken = set(client._dispatcher.connections)
    for connection in broken:
        connection.cut()
    await wait_until(
        lambda: broken.isdisjoint(client._dispatcher.connections),
        "the client has noticed that its connections are broken",
        timeout=_NOTICE_TIMEOUT_S,
    )


def engine_health(client: HasHealth, engine_id: int) -> EngineHealth:
    """How one engine is. Raises ValueError for an engine that does not exist."""
    engines = {engine.engine_id: engine for engine in client.health()}
    if engine_id not in engines:
        raise ValueError(f"there is no engine {engine_id!r}: the engines are {', '.join(map(str, engines))}")
    return engines[engine_id]


def is_stopped(engine: EngineHealth) -> bool:
    """Whether its process is, as `hang_engine` leaves it."""
    return engine.pid is not None and activity(engine.pid)[0] == "T"


def _pid(engine: EngineHealth) -> int:
    if engine.pid is None:
        raise ValueError(
            f"engine {engine.engine_id} has no process: it is {engine.state}. Wait with wait_engines_ready"
        )
    return engine.pid


async def _throttle(pid: int, factor: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        try:
            while True:
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(_SLOW_PERIOD_S * (1 - 1 / factor))
                os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(_SLOW_PERIOD_S / factor)
        finally:
            os.kill(pid, signal.SIGCONT)
