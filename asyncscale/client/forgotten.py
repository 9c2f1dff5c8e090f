"""The end of a client that nobody closed."""

from __future__ import annotations

import asyncio
import os
import warnings
import weakref
from contextlib import AsyncExitStack
from functools import partial
from typing import TypeVar

import zmq

from asyncscale.client.engines import Engines

T = TypeVar("T")

_cleanups: set[asyncio.Task[None]] = set()


def end_when_forgotten(
    client: T,
    loop: asyncio.AbstractEventLoop,
    cleanup: AsyncExitStack,
    engines: Engines,
    context: zmq.Context[zmq.Socket[bytes]],
    made_at: str,
) -> weakref.finalize[..., T]:
    """When the garbage collector takes the client, close all that it used, with a ResourceWarning. Detach to prevent.

    made_at: where in the user's program the client was made.

    None of the arguments may refer to the client: as long as it lives, they live.
    """
    name = f"{client!r}, made at {made_at}"
    finalizer = weakref.finalize(client, _end, name, os.getpid(), loop, cleanup, engines, context)
    finalizer.atexit = False  # the engines end then, and nothing else matters
    return finalizer


def end_now(engines: Engines, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Without the event loop, which is closed or about to be. Blocks until the engines have ended."""
    engines.abandon()
    context.destroy(linger=0)


def _end(
    client: str,
    owner_pid: int,
    loop: asyncio.AbstractEventLoop,
    cleanup: AsyncExitStack,
    engines: Engines,
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    """May run in any thread: wherever the garbage collector does."""
    if os.getpid() != owner_pid:
        return  # all of it belongs to the process that this is a fork of
    if loop.is_closed():
        end_now(engines, context)
    elif asyncio._get_running_loop() is loop:
        _start_cleanup(loop, cleanup, engines, context)  # as a task at once, so that a loop that now ends cancels it
    else:
        loop.call_soon_threadsafe(_start_cleanup, loop, cleanup, engines, context)
    text = f"unclosed client {client}: use `async with`, or await client.close()"
    warnings.warn(text, ResourceWarning, stacklevel=3)  # where it was forgotten


def _start_cleanup(
    loop: asyncio.AbstractEventLoop, cleanup: AsyncExitStack, engines: Engines, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    task = loop.create_task(cleanup.aclose())
    _cleanups.add(task)
    task.add_done_callback(partial(_end_cleanup, engines, context))


def _end_cleanup(engines: Engines, context: zmq.Context[zmq.Socket[bytes]], cleanup: asyncio.Task[None]) -> None:
    _cleanups.discard(cleanup)
    if cleanup.cancelled() or cleanup.exception() is not None:  # perhaps before it began, by the end of its loop
        end_now(engines, context)  # a context with open sockets would wait for ever when the garbage collector takes it
