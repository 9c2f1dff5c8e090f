"""The engines of a set, those that take requests and those that died, and how each is."""

from __future__ import annotations

import logging
import time
from typing import Literal

import msgspec

from asyncscale import messages, progress
from asyncscale.client.dispatcher import Dispatcher
from asyncscale.errors import EngineDeadError

logger = logging.getLogger(__name__)


class EngineHealth(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine is.

    state: "ready" takes requests; "restarting" died and is being started again; "dead" died too often, and stays so.
    restarts: how often it was started again. last_error: how it died last, in a sentence, None while it has not.
    last_step_age: seconds since it last completed a step; None when it has not yet, is not ready, or is on another
    host. pid: of its process, on its host; None while there is none.
    """

    engine_id: int
    state: Literal["ready", "restarting", "dead"]
    restarts: int
    last_error: str | None
    last_step_age: float | None
    pid: int | None = None


class Roster:
    """Keeps who is there and who is not, and tells the dispatcher. Both happen in one go, for each change.

    News may come late or twice: each incarnation joins once and leaves once, and then only its end may change.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._members: dict[int, messages.Member] = {}
        self._left: dict[int, messages.Left] = {}

    @property
    def members(self) -> list[messages.Member]:
        """The engines that take requests at this moment, in order."""
        return [self._members[engine_id] for engine_id in sorted(self._members)]

    @property
    def up(self) -> dict[int, bool]:
        """Of each engine whether it takes requests. From any thread: an engine is never missing."""
        return dict.fromkeys(self._left, False) | dict.fromkeys(self._members, True)

    @property
    def left(self) -> list[messages.Left]:
        """The engines that died and are not back, in order."""
        return [self._left[engine_id] for engine_id in sorted(self._left)]

    def __contains__(self, engine_id: int) -> bool:
        return engine_id in self._members

    def __getitem__(self, engine_id: int) -> messages.Member:
        return self._members[engine_id]

    def join(self, member: messages.Member) -> None:
        """An engine takes requests from now on. Not one that was found dead here before its owner saw it."""
        left = self._left.get(member.engine_id)
        if left is not None and left.incarnation >= member.incarnation:
            return
        self._members[member.engine_id] = member
        self._left.pop(member.engine_id, None)
        self._dispatcher.join(member)

    def leave(self, left: messages.Left) -> bool:
        """An engine died, or one that had died is given up. Whether that is news."""
        member, before = self._members.get(left.engine_id), self._left.get(left.engine_id)
        known = member or before
        if known is not None and left.incarnation < known.incarnation:
            return False
        is_given_up = before is not None and before.returns and not left.returns
        if member is not None or is_given_up:
            logger.error("%s", dead_error(left), extra={"engine_id": left.engine_id})
        self._leave(left)
        return True

    def _leave(self, left: messages.Left) -> None:
        self._left[left.engine_id] = left
        self._members.pop(left.engine_id, None)
        self._dispatcher.leave(dead_error(left), returns=left.returns)

    def replace(self, members: list[messages.Member], left: list[messages.Left]) -> None:
        """This is how it is, whatever was known before."""
        present = {(member.engine_id, member.incarnation) for member in members}
        for known in self.members:
            if (known.engine_id, known.incarnation) not in present:
                self.leave(messages.Left(known.engine_id, known.incarnation, _died(known), None, returns=True))
        for absent in left:
            self.leave(absent)
        for member in members:
            if member.engine_id in self._members:
                self._dispatcher.report(member.engine_id, member.load)
            else:
                self.join(member)

    def leave_all(self, reason: str) -> None:
        """All engines are gone for good, as is to be expected when their owner is."""
        for member in self.members:
            reason_here = f"engine {member.engine_id} ended: {reason}"
            self._leave(messages.Left(member.engine_id, member.incarnation, reason_here, None))
        for left in self.left:
            if left.returns:
                self._leave(msgspec.structs.replace(left, returns=False))

    def health(self) -> tuple[EngineHealth, ...]:
        """Every engine's, in order."""
        engine_ids = sorted({*self._members, *self._left})
        return tuple(self._health(engine_id) for engine_id in engine_ids)

    def _health(self, engine_id: int) -> EngineHealth:
        member = self._members.get(engine_id)
        if member is not None:
            return EngineHealth(
                engine_id=engine_id,
                state="ready",
                restarts=member.incarnation,
                last_error=member.last_error,
                last_step_age=_last_step_age(member.progress_path),
                pid=member.facts.pid,
            )
        left = self._left[engine_id]
        return EngineHealth(
            engine_id=engine_id,
            state="restarting" if left.returns else "dead",
            restarts=left.incarnation,
            last_error=left.reason,
            last_step_age=None,
        )


def dead_error(left: messages.Left) -> EngineDeadError:
    """What requests that need this engine end with."""
    return EngineDeadError(
        left.reason, engine_id=left.engine_id, exit_code=left.exit_code, stderr_tail=left.stderr_tail
    )


def _died(member: messages.Member) -> str:
    return f"engine {member.engine_id} died"


def _last_step_age(path: str | None) -> float | None:
    seen = None if path is None else progress.look(path)
    if seen is None or seen.step_ended is None:
        return None
    return max(0.0, time.monotonic() - seen.step_ended)
