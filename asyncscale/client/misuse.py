"""What somebody is told who takes a client, a request or a completion for something else."""

from __future__ import annotations

import asyncio
import sys

from asyncscale.client.completion import Completion
from asyncscale.errors import ClientStateError

_PACKAGE = __name__.partition(".")[0]
_OF_A_COMPLETION = frozenset(name for name in dir(Completion) if not name.startswith("_"))


def no_attribute(request: object, name: str, completion: str) -> AttributeError:
    """For a request that is asked for what it does not have, but perhaps its completion: that is `completion`."""
    kind = type(request).__name__
    text = f"{kind!r} object has no attribute {name!r}"
    if name in _OF_A_COMPLETION:
        text += f": it is a request under way. Write `{completion}.{name}`"
    return AttributeError(text, name=name, obj=request)


def request_stays_here() -> TypeError:
    """For a request that is to be copied or pickled."""
    return TypeError("a Generation cannot be copied or pickled: it is a request under way. Its completion can")


def client_stays_here() -> TypeError:
    """For a client that is to be copied or pickled."""
    return TypeError(
        "an AsyncScaleClient cannot be copied or pickled: its address can, from which another process makes a client "
        "of its own, AsyncScaleClient.attach(address)"
    )


def not_on_its_loop(what: str, loop: asyncio.AbstractEventLoop | None, *, is_fork: bool = False) -> ClientStateError:
    """For `what`, which is used where the event loop that it belongs to does not run."""
    attach = "or make a client of its own here: AsyncScaleClient.attach(client.address)"
    if is_fork:
        return ClientStateError(
            f"{what} was started by the process that this one is a fork of. Use it where it was started, {attach}"
        )
    if loop is not None and loop.is_closed():
        return ClientStateError(
            f"{what} was started on an event loop that is closed: each asyncio.run has its own. "
            "Make the client and use it in the same one"
        )
    if asyncio._get_running_loop() is None:
        return ClientStateError(
            f"{what} is used outside of the event loop that it was started on. Use it in a coroutine there; "
            "programs without an event loop, and threads, use asyncscale.blocking"
        )
    return ClientStateError(f"{what} was started on another event loop. Use it where it was started, {attach}")


def caller() -> str:
    """The file and line of the nearest caller outside of this package, "file:line"."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
