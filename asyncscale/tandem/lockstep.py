"""Simulated engines that step in lockstep, and fail when one of them would step alone. Sockets of this host, no torch.

Engine 0 of a generation listens in its meeting, and the others connect. In each collective operation they tell it
where they are, and it answers when all are in the same.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, NoReturn

import msgspec

from asyncscale.config import EngineConfig, SimulatedModel
from asyncscale.engine.batch import Batch, StepResult
from asyncscale.model.simulation import SimulatedRunner
from asyncscale.progress import Progress
from asyncscale.tandem.collective_errors import CollectiveError, SteppedAloneError
from asyncscale.tandem.meeting import JOIN_TIMEOUT_S, Meeting

# Of a live connection nothing is heard when its generation ends; so the meeting is looked at, too.
_LOOK_S = 0.05

_LISTENING = "listening"  # the key in the meeting

Kind = Literal["join", "any", "step"]


class Operation(msgspec.Struct, frozen=True, array_like=True):
    """Operations are told apart also by their number: engines that are out of step are found out even where each
    meets somebody."""

    kind: Kind
    generation: int
    number: int

    def __str__(self) -> str:
        return f"{self.kind} (operation {self.number} of generation {self.generation})"


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """Engine to engine 0: it waits in this operation for the others."""

    engine_id: int
    operation: Operation
    value: bool


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """Engine 0 to the others: whether any engine's value is true; or what is wrong."""

    value: bool
    defect: str | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode_arrival = msgspec.msgpack.Decoder(Arrival).decode
_decode_outcome = msgspec.msgpack.Decoder(Outcome).decode


class LockstepGroup:
    """The `Collectives` of one engine; `step` is the part of a step in which all engines are::

        group = LockstepGroup(folder, engine_id=0, num_engines=2)
        runner = LockstepRunner(model, config, group)
        tandem = TandemCore(EngineCore(runner, config), runner, group)

    folder: where generations meet, see `tandem.meeting`. progress: rests while this engine waits for others.
    timeout: seconds after which an engine that the others do not join, though they live, is alone. Then and when the
    others are elsewhere, every method but `join` and `leave` raises SteppedAloneError.
    """

    def __init__(
        self, folder: str, engine_id: int, num_engines: int, progress: Progress | None = None, timeout: float = 30.0
    ) -> None:
        self._folder = folder
        self._engine_id = engine_id
        self._num_engines = num_engines
        self._progress = progress or Progress()
        self._timeout = timeout
        self._meeting: Meeting | None = None
        self._generation = 0
        self._num_operations = 0
        self._connections: list[Connection] = []  # to engine 0; of engine 0, to all others

    def join(self, generation: int) -> None:
        self.leave()
        self._meeting = Meeting(self._folder, generation)
        self._generation = generation
        self._num_operations = 0
        with self._waiting():
            if self._engine_id == 0:
                self._listen(self._meeting)
            else:
                self._connect(self._meeting)
        self._meet("join", False)

    def leave(self) -> None:
        while self._connections:
            self._connections.pop().close()
        self._meeting = None

    def any(self, value: bool) -> bool:
        return self._meet("any", value)

    def step(self) -> None:
        """Wait until all engines have done their part of the step."""
        self._meet("step", False)

    # --- how they find each other

    def _listen(self, meeting: Meeting) -> None:
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(meeting.path / "socket"))
            listener.listen(self._num_engines)
            meeting.put(_LISTENING, b"")
            while len(self._connections) < self._num_engines - 1:
                if not _wait_for([listener], meeting, deadline):
                    num_here = len(self._connections) + 1
                    raise CollectiveError(
                        f"{num_here} of {self._num_engines} engines came to generation {self._generation} "
                        f"within {JOIN_TIMEOUT_S:g} s"
                    )
                connection, _ = listener.accept()
                self._connections.append(Connection(connection.detach()))

    def _connect(self, meeting: Meeting) -> None:
        meeting.get(_LISTENING)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.fspath(meeting.path / "socket"))
            self._connections.append(Connection(connection.detach()))

    # --- how they meet

    def _meet(self, kind: Kind, value: bool) -> bool:
        """Wait until all engines are in this operation. Returns whether any of their values is true."""
        meeting = self._meeting
        if meeting is None:
            raise CollectiveError(f"generation {self._generation} was left")
        operation = Operation(kind, self._generation, self._num_operations)
        self._num_operations += 1
        with self._waiting():
            if self._engine_id == 0:
                return self._gather(operation, value, meeting)
            return self._arrive(operation, value, meeting)

    def _gather(self, operation: Operation, value: bool, meeting: Meeting) -> bool:
        deadline = self._deadline(operation)
        here = {0}
        while len(here) < self._num_engines:
            # Also those of engines that are here: the end of such a connection is to be seen while others are awaited.
            connections = _wait_for(self._connections, meeting, deadline)
            if not connections:
                self._fail(f"engines {sorted(here)} are alone in {operation}")
            for connection in connections:
                arrival = _decode_arrival(connection.recv_bytes())
                if arrival.operation != operation:
                    self._fail(
                        f"engine {arrival.engine_id} is in {arrival.operation}, and engines {sorted(here)} "
                        f"are in {operation}"
                    )
                here.add(arrival.engine_id)
                value = value or arrival.value
        self._tell(Outcome(value))
        return value

    def _arrive(self, operation: Operation, value: bool, meeting: Meeting) -> bool:
        (connection,) = self._connections
        connection.send_bytes(_encode(Arrival(self._engine_id, operation, value)))
        if not _wait_for([connection], meeting, self._deadline(operation)):
            self._fail(f"engine {self._engine_id} is alone in {operation}, or not all others came")
        outcome = _decode_outcome(connection.recv_bytes())
        if outcome.defect is not None:
            self._fail(outcome.defect)
        return outcome.value

    def _deadline(self, operation: Operation) -> float:
        return time.monotonic() + (JOIN_TIMEOUT_S if operation.kind == "join" else self._timeout)

    def _tell(self, outcome: Outcome) -> None:
        for connection in self._connections:
            connection.send_bytes(_encode(outcome))

    def _fail(self, defect: str) -> NoReturn:
        if self._engine_id == 0:
            with contextlib.suppress(OSError):
                self._tell(Outcome(False, defect))
        self.leave()
        raise SteppedAloneError(defect)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """For others: so this engine does not hang, and if one of them is gone, the generation is over."""
        self._progress.rest()
        try:
            yield
        except (OSError, EOFError) as error:
            raise CollectiveError(f"another engine of generation {self._generation} is gone") from error
        finally:
            self._progress.work()


def _wait_for(connections: Sequence[Connection | socket.socket], meeting: Meeting, deadline: float) -> list[Any]:
    """Those that have something, or an end; none after the deadline. Raises CollectiveError when the meeting closes."""
    while True:
        ready = wait(connections, max(0.0, min(_LOOK_S, deadline - time.monotonic())))
        if ready or time.monotonic() >= deadline:
            return ready
        meeting.check_open()


class LockstepRunner(SimulatedRunner):
    """A SimulatedRunner whose every step is collective, as that of a model that is spread over the engines: it takes as
    long as the slowest engine's. A step without a batch takes `base_ms`."""

    def __init__(self, model: SimulatedModel, config: EngineConfig, group: LockstepGroup) -> None:
        super().__init__(model, config)
        self._group = group

    def execute(self, batch: Batch, meanwhile: Callable[[], None] = lambda: None) -> StepResult:
        result = super().execute(batch, meanwhile)
        self._group.step()
        return result

    def execute_dummy(self, meanwhile: Callable[[], None]) -> None:
        """Take part in a step without a batch."""
        start = time.monotonic()
        meanwhile()
        self._sleep_until(start + self._model.base_ms * 1e-3)
        self._group.step()
