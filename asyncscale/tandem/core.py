"""An engine core that steps together with those of other engines. No I/O of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from asyncscale.messages import Outputs
from asyncscale.tandem.collective_errors import CollectiveError
from asyncscale.tandem.engine import EngineWaves
from asyncscale.tandem.messages import FromTandemEngine, GroupState

if TYPE_CHECKING:
    from asyncscale.engine.core import EngineCore


class Collectives(Protocol):
    """How an engine meets the others of its group. Every method may raise CollectiveError, after which only `join`
    makes sense."""

    def join(self, generation: int) -> None:
        """Leave the group, if there is one, and wait for all engines to join under this number."""

    def leave(self) -> None:
        """Leave the group: who waits for this engine there gets a CollectiveError. Raises nothing."""

    def any(self, value: bool) -> bool:
        """Whether any engine's value is true."""


class TandemRunner(Protocol):
    """A Runner whose `execute` may be collective."""

    def execute_dummy(self, meanwhile: Callable[[], None]) -> None:
        """Take part in a step without a batch, so that the other engines can go on."""


class TandemCore:
    """::

        tandem = TandemCore(core, runner, collectives)
        while True:
            ...  # take what has arrived: core.add and the like, tandem.on_group_state; sleep while not tandem.has_work
            tandem.follow()
            if tandem.has_work:
                outputs = tandem.step()
            if (report := tandem.report()) is not None:
                ...  # send it to the coordinator

    runner: the one that `core` computes with. num_dummies: steps for which the core had nothing to compute.
    """

    def __init__(
        self, core: EngineCore, runner: TandemRunner, collectives: Collectives, waves: EngineWaves | None = None
    ) -> None:
        self._core = core
        self._runner = runner
        self._collectives = collectives
        self._waves = waves or EngineWaves()
        self.num_dummies = 0

    @property
    def running(self) -> bool:
        """Whether to step, with or without work."""
        return self._waves.running

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute, be it for others, or to hand out."""
        return self._waves.running or self._core.has_outputs

    @property
    def position(self) -> tuple[int, int, int]:
        """Generation, wave, and how many steps of it are done."""
        return self._waves.generation, self._waves.wave, self._waves.num_steps

    def on_group_state(self, state: GroupState) -> None:
        """What the coordinator has decided."""
        self._waves.on_group_state(state)

    def follow(self) -> bool:
        """Join a new generation, if there is one; waits for the other engines. Whether all have met there."""
        waves, has_met = self._waves, False
        while (generation := waves.generation_to_join) is not None:
            try:
                self._collectives.join(generation)
            except CollectiveError:
                self._break(generation)
            else:
                waves.joined(generation)
                has_met = True
        return has_met

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> dict[bytes, Outputs]:
        """As `EngineCore.step`, together with the other engines. One that fails has made nothing, and is made again.

        While the group pauses, nothing is computed.
        """
        waves, core = self._waves, self._core
        if not waves.running:
            return core.flush()
        outputs: dict[bytes, Outputs] = {}
        has_batch = False

        def note_batch() -> None:
            nonlocal has_batch
            has_batch = True
            meanwhile()

        try:
            outputs = core.step(note_batch)
            if not has_batch:
                self.num_dummies += 1
                self._runner.execute_dummy(meanwhile)
            if waves.step_done():
                waves.agreed(self._collectives.any(waves.vote(self._has_requests)))
        except CollectiveError:
            self._break(waves.generation)
        return outputs

    def report(self) -> FromTandemEngine | None:
        """What the coordinator must hear now, if anything."""
        return self._waves.report(self._has_requests)

    @property
    def _has_requests(self) -> bool:
        return bool(self._core.clients)

    def _break(self, generation: int) -> None:
        self._collectives.leave()
        self._waves.broke(generation)
