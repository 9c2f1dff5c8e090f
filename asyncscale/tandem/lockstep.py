"""Simulated engines that step in lockstep: threads of one process that fail when one of them would step alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

from asyncscale.config import EngineConfig, SimulatedModel
from asyncscale.engine.batch import Batch, StepResult
from asyncscale.model.simulation import SimulatedRunner
from asyncscale.tandem.core import CollectiveError

Operation = tuple[str, int, int]  # kind, generation, number within that


class SteppedAloneError(AssertionError):
    """An engine is in a collective operation in which not all others are, or will be."""


class Lockstep:
    """Where the engines of a group meet::

        lockstep = Lockstep(num_engines=2)
        runner = LockstepRunner(model, config, lockstep.member(0))  # in a thread for each engine
        tandem = TandemCore(EngineCore(runner, config), runner, runner.member)

    timeout: seconds after which an engine that the others do not join is alone.
    """

    def __init__(self, num_engines: int, timeout: float = 10.0) -> None:
        self._num_engines = num_engines
        self._timeout = timeout
        self._changed = threading.Condition()
        self._values: dict[int, bool] = {}  # of the engines that are here, in the operation `_operation`
        self._operation: Operation = ("", 0, 0)
        self._result = False
        self._num_done = 0  # operations that all engines were in
        self._last_ended = 0  # generations up to this one are over
        self._failure: SteppedAloneError | None = None

    def member(self, engine_id: int) -> LockstepMember:
        """One engine's way to the others."""
        return LockstepMember(self, engine_id)

    def end(self, generation: int) -> None:
        """This generation is over: who is in an operation of it, or will be, gets a CollectiveError."""
        with self._changed:
            self._last_ended = max(self._last_ended, generation)
            self._changed.notify_all()

    def meet(self, engine_id: int, operation: Operation, value: bool) -> bool:
        """Wait until all engines are in this operation. Returns whether any of their values is true."""
        _, generation, _ = operation
        with self._changed:
            self._check(generation)
            if self._operation[1] <= self._last_ended:
                self._values.clear()  # they have yet to wake up, and will hear of that
            if self._values and operation != self._operation:
                self._fail(
                    f"engine {engine_id} is in {operation}, and engines {sorted(self._values)} in {self._operation}"
                )
            self._operation = operation
            self._values[engine_id] = value
            num_done = self._num_done
            if len(self._values) == self._num_engines:
                self._result = any(self._values.values())
                self._values.clear()
                self._num_done += 1
                self._changed.notify_all()
            while self._num_done == num_done:
                if not self._changed.wait(self._timeout):
                    self._fail(f"engines {sorted(self._values)} are alone in {operation}")
                if self._num_done == num_done and (self._failure is not None or generation <= self._last_ended):
                    self._values.pop(engine_id, None)
                    self._check(generation)
            return self._result

    def _check(self, generation: int) -> None:
        if self._failure is not None:
            raise self._failure
        if generation <= self._last_ended:
            raise CollectiveError(f"generation {generation} is over")

    def _fail(self, defect: str) -> None:
        if self._failure is None:
            self._failure = SteppedAloneError(defect)
        self._changed.notify_all()
        raise self._failure


class LockstepMember:
    """The `Collectives` of one engine.

    Operations are told apart by kind, generation and number: engines that are out of step are found out even where each
    meets somebody.
    """

    def __init__(self, lockstep: Lockstep, engine_id: int) -> None:
        self._lockstep = lockstep
        self._engine_id = engine_id
        self._generation = 0
        self._num_operations = 0

    def join(self, generation: int) -> None:
        self.leave()
        self._generation = generation
        self._num_operations = 0
        self._meet("join", False)

    def leave(self) -> None:
        self._lockstep.end(self._generation)

    def any(self, value: bool) -> bool:
        return self._meet("any", value)

    def step(self) -> None:
        """The part of a step in which all engines are."""
        self._meet("step", False)

    def _meet(self, kind: str, value: bool) -> bool:
        operation = (kind, self._generation, self._num_operations)
        self._num_operations += 1
        return self._lockstep.meet(self._engine_id, operation, value)


class LockstepRunner(SimulatedRunner):
    """A SimulatedRunner whose every step is collective, as that of a model that is spread over the engines."""

    def __init__(self, model: SimulatedModel, config: EngineConfig, member: LockstepMember) -> None:
        super().__init__(model, config)
        self.member = member

    def execute(self, batch: Batch, meanwhile: Callable[[], None] = lambda: None) -> StepResult:
        meanwhile()
        self.member.step()
        return super().execute(batch)

    def execute_dummy(self, meanwhile: Callable[[], None]) -> None:
        """Take part in a step without a batch."""
        meanwhile()
        self.member.step()
