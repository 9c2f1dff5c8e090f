"""The front end's process: attach to the engines, run the user's `main`, tell its outcome. `run_frontend` is its entry
point.

The lifeline carries `main` in, and the outcome out. A thread waits for its other end to close, which is how the caller
stops a front end, and what is seen when the caller dies: then `main` is cancelled, and what does not end is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from asyncscale import messages
from asyncscale.client import pickling
from asyncscale.client.client import AsyncScaleClient
from asyncscale.client.spawn import GROUP_SIGNALS, close_in_forks

# A front end that was stopped has this long to clean up and exit.
STOP_GRACE_S = 3.0
# Each payload on the lifeline follows its own length in bytes.
HEADER = struct.Struct("!Q")


@dataclass(frozen=True)
class FrontendJob:
    """What a front end is told at its start; `main` follows on the lifeline."""

    index: int
    address: str = field(repr=False)
    argv: list[str]


def as_socket(lifeline: Connection) -> socket.socket:
    """Take over a lifeline: as a socket, event loops can read and write it without blocking."""
    with lifeline:
        taken = socket.socket(fileno=os.dup(lifeline.fileno()))
    close_in_forks(taken)
    return taken


def run_frontend(job: FrontendJob, lifeline: Connection) -> None:
    """Run the `main` that comes on `lifeline`, and send back how it ended. A stopped one ends without a word."""
    _ignore_group_signals()
    sys.argv = job.argv
    with as_socket(lifeline) as channel:
        function = _receive(channel)
        if function is None:
            return
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            outcome = runner.run(_serve(job, function, channel))
            if isinstance(outcome, messages.Raised):
                _send(channel, outcome)  # at once: what `main` left running may hold up the closing of the runner
        if isinstance(outcome, messages.Returned):
            _send(channel, outcome)


def _ignore_group_signals() -> None:
    """By handlers that do nothing: unlike SIG_IGN, no process that `main` starts inherits them, and forks drop them."""
    for number in GROUP_SIGNALS:
        signal.signal(number, lambda *_: None)
    os.register_at_fork(
        before=_block_group_signals, after_in_parent=_unblock_group_signals, after_in_child=_restore_group_signals
    )
    _unblock_group_signals()  # blocked while the interpreter started


def _block_group_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)


def _unblock_group_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)


def _restore_group_signals() -> None:
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    _unblock_group_signals()


async def _serve(job: FrontendJob, function: bytes, channel: socket.socket) -> messages.FromFrontend:
    task = asyncio.current_task()
    threading.Thread(
        target=_end_with_caller, args=(channel, asyncio.get_running_loop(), task), name="lifeline", daemon=True
    ).start()
    try:
        result = await _run_main(job, function)
    except (SystemExit, KeyboardInterrupt):
        raise  # the process ends with it
    except BaseException as error:
        return _raised(error)
    try:
        return messages.Returned(pickling.dumps(result))
    except Exception as error:
        summary = f"returned a {type(result).__name__} that cannot be pickled ({_describe(error)})"
        return messages.Raised(None, summary, _format(error))


async def _run_main(job: FrontendJob, function: bytes) -> Any:
    main = pickling.loads(function)
    async with AsyncScaleClient.attach(job.address) as client:
        running = main(client, job.index)
        if not inspect.isawaitable(running):
            kind = type(running).__name__
            raise TypeError(f"main must be an async function, but it returned {kind}: write `async def`")
        return await running


def _raised(error: BaseException) -> messages.Raised:
    if isinstance(error, asyncio.CancelledError):  # raised in the caller, it would cancel the caller's own task
        return messages.Raised(None, "was cancelled from within", _format(error))
    try:
        return messages.Raised(pickling.dumps(error), f"raised {_describe(error)}", _format(error))
    except Exception as why:
        summary = f"raised {_describe(error)}, which cannot be pickled ({_describe(why)})"
        return messages.Raised(None, summary, _format(error))


def _describe(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _format(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).strip()


def _end_with_caller(channel: socket.socket, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
    with contextlib.suppress(OSError):
        channel.recv(1)  # the caller says no more: this returns when it has closed its end
    with contextlib.suppress(RuntimeError):  # the loop is closed already
        loop.call_soon_threadsafe(task.cancel)
    time.sleep(STOP_GRACE_S)
    os._exit(1)


def _receive(channel: socket.socket) -> bytes | None:
    """The next payload; None when the caller is gone."""
    with contextlib.suppress(ConnectionError), channel.makefile("rb") as stream:
        header = stream.read(HEADER.size)
        if len(header) == HEADER.size:
            (size,) = HEADER.unpack(header)
            payload = stream.read(size)
            if len(payload) == size:
                return payload
    return None


def _send(channel: socket.socket, outcome: messages.FromFrontend) -> None:
    payload = messages.encoder.encode(outcome)
    with contextlib.suppress(ConnectionError):  # nobody waits for it any more
        channel.sendall(HEADER.pack(len(payload)))
        channel.sendall(payload)
