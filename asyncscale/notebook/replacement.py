"""A cell that makes a client and is run again: the client that it made before is closed."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from asyncscale.client.state import State
from asyncscale.notebook.cells import MadeInCells

if TYPE_CHECKING:
    from asyncscale.client.client import AsyncScaleClient

_made: MadeInCells[AsyncScaleClient] = MadeInCells()
_closing: set[concurrent.futures.Future[None]] = set()  # until they are closed

_PACKAGE = str(Path(__file__).parent.parent)


def close_replaced(new: AsyncScaleClient) -> list[concurrent.futures.Future[None]]:
    """Begin to close what the running cell made before, with a warning; the futures are done when that is closed.

    Two clients of one run, and those of other cells, stay.
    """
    run, earlier = _made.replaced_by(new)
    started = [client for client in earlier if client._life.state not in (State.NEW, State.CLOSED)]
    used = [repr(client) for client in started if client._life.state is not State.CLOSING]
    if run is not None and used:
        warnings.warn(
            f"closed what this cell made when it ran before, as In [{run.number}]: {', '.join(used)}. "
            "To keep a client, make it in a cell of its own; to see no warning, `await client.close()` first",
            stacklevel=_stacklevel_of_caller(),
        )
    return [_begin_close(client) for client in started]


async def wait_closed(closings: list[concurrent.futures.Future[None]], timeout: float = 10.0) -> None:
    """Return when the predecessors are closed: cores and memory are then free for whom replaces them."""
    if closings:
        await asyncio.wait(map(asyncio.wrap_future, closings), timeout=timeout)


def _begin_close(client: AsyncScaleClient) -> concurrent.futures.Future[None]:
    loop = client._life.loop
    if loop is None or loop.is_closed():  # then it can be closed from any other
        loop = asyncio.get_running_loop()
    closing = asyncio.run_coroutine_threadsafe(client.close(drain=False), loop)
    _closing.add(closing)
    closing.add_done_callback(_closing.discard)
    return closing


def _stacklevel_of_caller() -> int:
    """Of `warnings.warn`, so that it shows the line that is not of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    return level
