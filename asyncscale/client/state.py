"""Where a client is in its life, and what to say of a call that does not belong there."""

from __future__ import annotations

import asyncio
import enum

from asyncscale.errors import ClientClosedError, ClientStateError


class State(enum.Enum):
    """In the order in which a client passes through them; the values are for people."""

    NEW = "not started"
    STARTING = "starting"
    RUNNING = "running"
    CLOSING = "closing"
    CLOSED = "closed"


def wrong_state(state: State, wanted: str) -> ClientStateError:
    """The error for a client that cannot be `wanted` ("start", "use") in this state; it names the cure."""
    match state:
        case State.NEW:
            synchronous = asyncio._get_running_loop() is None
            return ClientStateError(
                "the client is not started: use `async with AsyncScaleClient(...) as client:` or `await client.start()`"
                + ("; synchronous programs use asyncscale.blocking" if synchronous else "")
            )
        case State.STARTING:
            return ClientStateError("the client is still starting: await start() first")
        case State.RUNNING:
            return ClientStateError(f"cannot {wanted} the client: it is running already")
        case _:
            return ClientClosedError(
                f"cannot {wanted} the client: it is {state.value} (leaving `async with` does that). Make a new one"
            )
