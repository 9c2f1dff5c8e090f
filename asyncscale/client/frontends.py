"""Runs a user's function in processes of their own, each with a client attached to the same engines."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from asyncscale import messages
from asyncscale.client import child_process, pickling
from asyncscale.client.client import AsyncScaleClient
from asyncscale.client.frontend_process import HEADER, STOP_GRACE_S, FrontendJob, as_socket, run_frontend
from asyncscale.client.spawn import start_process
from asyncscale.errors import FrontendError

T = TypeVar("T")


async def run_frontends(main: Callable[[AsyncScaleClient, int], Awaitable[T]], count: int, address: str) -> list[T]:
    """Run `await main(client, index)` in `count` new processes, and return the results in the order of `index`::

        async def main(client, index):
            return await asyncio.gather(*map(client.generate, prompts[index::4]))

        results = await run_frontends(main, 4, client.address)

    Each process has a uvloop of its own, and a client attached to the engines at `address`, which may be this
    process's or another's. main: any function that cloudpickle can send, also of a script without a main guard, of a
    notebook, or a closure; what it refers to is copied into each process, and so are its results.

    When one raises, that exception is raised here (the first one, with its traceback in a note); all others are then
    cancelled, as all are when this call is cancelled. Front ends end with the calling process, too, and whatever does
    not end within 3 seconds is killed.

    Raises TypeError and ValueError for wrong arguments, before any process starts; FrontendError when one ends without
    a result, or with a result or an exception that cannot be pickled.
    """
    function = _check(main, count, address)
    frontends: list[_Frontend] = []
    try:
        async with asyncio.TaskGroup() as group:
            runs: list[asyncio.Task[T]] = []
            for index in range(count):
                frontends.append(_Frontend(index, address))
                runs.append(group.create_task(frontends[-1].run(function)))
                await asyncio.sleep(0)  # to start a process takes milliseconds: let others run in between
        return [run.result() for run in runs]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        await _stop(frontends)


def _check(main: Callable[..., Any], count: int, address: str) -> bytes:
    _check_function(main)
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"count must be an integer, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    AsyncScaleClient.attach(address)  # says what is wrong with an address that cannot be one
    try:
        return pickling.dumps_function(main)
    except Exception as error:
        raise TypeError(
            f"main cannot be sent to another process: it refers to something that cannot be pickled ({error}). "
            "Make or open that in main itself; a client is passed to it"
        ) from error


def _check_function(main: object) -> None:
    wanted = "main must be an async function (client, index)"
    if not callable(main):
        cure = ": pass main itself, not what it returns" if inspect.iscoroutine(main) else ""
        raise TypeError(f"{wanted}, got {type(main).__name__}{cure}")
    if inspect.isasyncgenfunction(main) or inspect.isgeneratorfunction(main):
        raise TypeError(f"{wanted} that returns its results, but it yields")
    with contextlib.suppress(ValueError):  # some callables do not tell their arguments
        signature = inspect.signature(main)
        try:
            signature.bind(None, 0)
        except TypeError as error:
            raise TypeError(f"{wanted}, but its arguments are {signature}: {error}") from None


async def _stop(frontends: Sequence[_Frontend]) -> None:
    """Close the lifelines, which ends the processes; kill those that do not end in time. Idempotent."""
    stopping = [frontend for frontend in frontends if not frontend.stopped]
    for frontend in stopping:
        frontend.stopped = True
        frontend.channel.close()
    try:
        await child_process.wait_exits([frontend.process for frontend in stopping], STOP_GRACE_S)
    finally:
        for frontend in stopping:
            child_process.release(frontend.process)


class _Frontend:
    """One front end's process, seen from its caller."""

    def __init__(self, index: int, address: str) -> None:
        self._index = index
        job = FrontendJob(index, address, sys.argv)
        self.process, lifeline = start_process(f"frontend-{index}", run_frontend, job)
        self.channel = as_socket(lifeline)
        self.channel.setblocking(False)
        self.stopped = False

    async def run(self, function: bytes) -> Any:
        """Send `main`, wait for the outcome, and return or raise it."""
        try:
            await self._send(function)
            outcome = messages.from_frontend_decoder.decode(await self._receive())
        except (ConnectionError, EOFError):
            raise await self._lost() from None
        if isinstance(outcome, messages.Raised):
            raise self._error(outcome)
        try:
            result = pickling.loads(outcome.result)
        except Exception as error:
            message = f"front end {self._index} returned what cannot be unpickled here"
            raise FrontendError(message, index=self._index) from error
        await _stop([self])
        return result

    async def _send(self, payload: bytes) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.channel, HEADER.pack(len(payload)))
        await loop.sock_sendall(self.channel, payload)

    async def _receive(self) -> bytearray:
        (size,) = HEADER.unpack(await _receive_exactly(self.channel, HEADER.size))
        return await _receive_exactly(self.channel, size)

    def _error(self, outcome: messages.Raised) -> BaseException:
        error: BaseException | None = None
        if outcome.error is not None:
            try:
                error = pickling.loads(outcome.error)
            except Exception as why:
                summary = f"{outcome.summary}, which cannot be unpickled here ({why})"
                error = FrontendError(f"front end {self._index} {summary}", index=self._index)
        if error is None:
            error = FrontendError(f"front end {self._index} {outcome.summary}", index=self._index)
        error.add_note(f"--- traceback in front end {self._index} ---\n{outcome.traceback}")
        return error

    async def _lost(self) -> FrontendError:
        exited = await child_process.wait_exit(self.process, STOP_GRACE_S)
        code = child_process.collect_exit_code(self.process) if exited else None
        message = f"front end {self._index} ended without a result ({child_process.describe_exit(code)})"
        return FrontendError(message, index=self._index, exit_code=code)


async def _receive_exactly(channel: socket.socket, size: int) -> bytearray:
    loop = asyncio.get_running_loop()
    received = bytearray(size)
    view = memoryview(received)
    while view:
        count = await loop.sock_recv_into(channel, view)
        if count == 0:
            raise EOFError
        view = view[count:]
    return received
