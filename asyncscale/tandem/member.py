"""An engine process's part in its group: what its owner says, and what it has to tell the owner."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from asyncscale.messages import Outputs
from asyncscale.tandem.messages import FromTandemEngine, GroupState, Met

if TYPE_CHECKING:
    from asyncscale.tandem.core import TandemCore


class Mailbox:
    """Takes the owner's messages from the thread that reads them to the one that sleeps in poll, and wakes that::

    mailbox.put(state)                     # in one thread
    poller.register(mailbox.fileno(), POLLIN)  # in the other
    for state in mailbox.take(): ...
    """

    def __init__(self) -> None:
        self._states: SimpleQueue[GroupState] = SimpleQueue()
        self._wakes, self._waker = socket.socketpair()
        for end in (self._wakes, self._waker):
            end.setblocking(False)

    def put(self, state: GroupState) -> None:
        self._states.put(state)
        with contextlib.suppress(BlockingIOError):  # thousands of wake-ups are under way
            self._waker.send(b"!")

    def fileno(self) -> int:
        """Readable while there is something to take."""
        return self._wakes.fileno()

    def take(self) -> list[GroupState]:
        """All that has come, in order. Does not wait."""
        if self._states.empty():
            return []
        with contextlib.suppress(BlockingIOError):
            self._wakes.recv(4096)  # before the queue: what comes from now on wakes again
        states = []
        with contextlib.suppress(Empty):
            while True:
                states.append(self._states.get_nowait())
        return states


class GroupMember:
    """A TandemCore that hears its owner in `mailbox`, and speaks by `tell`::

    while True:
        ...  # sleep while not member.has_work, until the mailbox or something else is readable
        member.follow()
        if member.has_work:
            outputs = member.step()
        member.report()
    """

    def __init__(self, tandem: TandemCore, mailbox: Mailbox, tell: Callable[[FromTandemEngine], None]) -> None:
        self._tandem = tandem
        self._mailbox = mailbox
        self._tell = tell

    def fileno(self) -> int:
        """Readable when the owner has said something."""
        return self._mailbox.fileno()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute, be it for others, or to hand out."""
        return self._tandem.has_work

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> dict[bytes, Outputs]:
        """As `EngineCore.step`."""
        return self._tandem.step(meanwhile)

    def follow(self) -> None:
        """Do what the owner has said. When the group is formed anew, this waits for the other engines."""
        for state in self._mailbox.take():
            self._tandem.on_group_state(state)
        if self._tandem.follow():
            self._tell(Met(self._tandem.position[0]))

    def report(self) -> None:
        """Tell the owner what it must hear now, if anything."""
        report = self._tandem.report()
        if report is not None:
            self._tell(report)

    def stats(self) -> dict[str, int]:
        """Where the engine is, and for how many steps it had nothing to compute."""
        generation, wave, num_steps = self._tandem.position
        return {
            "generation": generation,
            "wave": wave,
            "num_steps": num_steps,
            "num_dummy_steps": self._tandem.num_dummies,
        }
