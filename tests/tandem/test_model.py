"""Every interleaving of engines, coordinator and clients; and that a broken machine would be found out."""

from __future__ import annotations

import pytest
from explorer import CounterExample, Explored, explore
from wave_model import WaveModel

from asyncscale.tandem.client import ClientWaves
from asyncscale.tandem.coordinator import CoordinatorWaves
from asyncscale.tandem.engine import EngineWaves
from asyncscale.tandem.messages import Broken, FromTandemEngine, GroupState, Paused, Wake

ONE_STEP_EACH = ((1,), (1,))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(WaveModel(ONE_STEP_EACH, is_formed=False), id="first generation"),
        pytest.param(WaveModel(((2,), (1,)), aborts=1), id="abort"),
        pytest.param(WaveModel(((1, 1), (1,))), id="a client goes on"),
        pytest.param(WaveModel(ONE_STEP_EACH, holds=1), id="hold"),
        pytest.param(WaveModel(ONE_STEP_EACH, failures=1), id="failed collective"),
        pytest.param(WaveModel(((2,),), deaths=1), id="death"),
        pytest.param(WaveModel(((2,), (1,)), num_engines=3), id="three engines"),
        pytest.param(WaveModel(((1,),), num_engines=3, holds=1), id="three engines, hold"),
    ],
)
def test_every_run_ends_with_all_requests_done_and_all_engines_paused(model: WaveModel) -> None:
    explored = model.check()
    assert explored.num_states > 1000
    assert explored.num_ends > 0


def test_with_nothing_forgotten_and_no_two_states_taken_for_one() -> None:
    """That stale messages do nothing is checked for each machine; here they arrive in fact, again and again."""
    WaveModel(ONE_STEP_EACH, forgets=False).check()


# --- machines that are broken, each in one way; what the model checker finds wrong with them


class StartsForStaleWakes(CoordinatorWaves):
    def on_wake(self, wake: Wake) -> GroupState | None:
        return super().on_wake(Wake(wake.generation, self.state.wave))


class StartsForStaleReports(CoordinatorWaves):
    def on_report(self, report: FromTandemEngine) -> GroupState | None:
        if isinstance(report, Paused) and report.wave < self.state.wave:
            report = Paused(report.generation, self.state.wave, report.has_work)
        return super().on_report(report)


class MindsNoGeneration(CoordinatorWaves):
    def on_report(self, report: FromTandemEngine) -> GroupState | None:
        if isinstance(report, Paused):
            report = Paused(self.state.generation, report.wave, report.has_work)
        return super().on_report(report)


class StartsWhileHeld(CoordinatorWaves):
    """As one that assumes that they run when it has only asked them to."""

    def _decide(self) -> GroupState | None:
        if self._is_wanted and self.state.held and not self.state.running:
            self._is_wanted = False
            self._change(running=True)
        return super()._decide()


class NeverHearsOfTheEnd(CoordinatorWaves):
    def on_report(self, report: FromTandemEngine) -> GroupState | None:
        if isinstance(report, Paused) and self.state.running:
            return None
        return super().on_report(report)


class ForgetsWhoWantsToBeginWhileHeld(CoordinatorWaves):
    def on_report(self, report: FromTandemEngine) -> GroupState | None:
        state = super().on_report(report)
        self._is_wanted = self._is_wanted and not self.state.held
        return state


class GoesOnInABrokenGeneration(CoordinatorWaves):
    def on_report(self, report: FromTandemEngine) -> GroupState | None:
        return None if isinstance(report, Broken) else super().on_report(report)


class KeepsTheGeneration(CoordinatorWaves):
    def engine_joined(self, engine_id: int) -> GroupState | None:
        self._engines.add(engine_id)
        if len(self._engines) < self._num_engines or not self.state.generation:
            return super().engine_joined(engine_id)
        self._change(whole=True)
        return self._decide()


class RearmedByALateStart(EngineWaves):
    __slots__ = ()

    def on_group_state(self, state: GroupState) -> None:
        super().on_group_state(state)
        if state.running and self._is_whole and not self.running and state.generation == self.generation:
            self.running = True
            self.num_steps, self._next_sync = 0, 1


class IgnoresStartsWhileHeld(EngineWaves):
    __slots__ = ()

    def _follow(self) -> None:
        if not self._group.held:
            super()._follow()


class LeavesItselfOut(EngineWaves):
    """It does not take the start for its own that it asked for."""

    __slots__ = ()

    def _follow(self) -> None:
        asked = self._told == (self.generation, self.wave, True)
        if not asked:
            super()._follow()


class StartsByItself(EngineWaves):
    __slots__ = ()

    def report(self, has_work: bool) -> FromTandemEngine | None:
        report = super().report(has_work)
        if isinstance(report, Paused) and has_work:
            self.running = True
            self.num_steps, self._next_sync = 0, 1
        return report


class SaysNothing(EngineWaves):
    __slots__ = ()

    def report(self, has_work: bool) -> FromTandemEngine | None:
        return super().report(False)


class SaysNothingBeforeTheFirstWave(EngineWaves):
    __slots__ = ()

    def report(self, has_work: bool) -> FromTandemEngine | None:
        return super().report(has_work and self.wave > 0)


class PausesWhenItHasNoWorkItself(EngineWaves):
    __slots__ = ()

    def vote(self, has_work: bool) -> bool:
        self._told_broken = -int(has_work)  # a place for what it votes
        return super().vote(has_work)

    def agreed(self, go_on: bool) -> None:
        super().agreed(go_on and self._told_broken == -1)


class KeepsItsWave(EngineWaves):
    __slots__ = ()

    def joined(self, generation: int) -> None:
        wave = self.wave
        super().joined(generation)
        self.wave = wave


class CountsStepsSinceItsOwnStart(EngineWaves):
    """So that an engine that was started again is not in step with the others."""

    __slots__ = ()

    def joined(self, generation: int) -> None:
        num_steps = self.num_steps
        super().joined(generation)
        self._go_on(num_steps)

    def _follow(self) -> None:
        num_steps = self.num_steps
        super()._follow()
        self._go_on(num_steps)

    def _go_on(self, num_steps: int) -> None:
        self.num_steps = num_steps
        if self.running:
            self._next_sync = num_steps + 1 + num_steps % 2


class VotesForWorkThoughHeld(EngineWaves):
    __slots__ = ()

    def vote(self, has_work: bool) -> bool:
        return has_work or self._group.held


class WakesForEveryRequest(ClientWaves):
    """As one that is right for a client; it shows that the model finds nothing wrong where nothing is."""

    __slots__ = ()

    def request_sent(self) -> Wake | None:
        return Wake(self._group.generation, self._group.wave)


class NeverWakes(ClientWaves):
    __slots__ = ()

    def request_sent(self) -> Wake | None:
        return None


def model_of(machine: type, **settings: object) -> WaveModel:
    kind = {CoordinatorWaves: "coordinator", EngineWaves: "engine", ClientWaves: "client"}[machine.__base__]  # type: ignore[index]
    defaults = {"requests": ((1,),), "forgets": False}
    return WaveModel(**{**defaults, **settings, kind: machine})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machine", "settings", "defect"),
    [
        (StartsForStaleWakes, {}, "more waves than there is reason for"),
        (StartsForStaleReports, {}, "more waves than there is reason for"),
        (MindsNoGeneration, {"holds": 1, "failures": 1}, "steps while the group is said to be at rest"),
        (StartsWhileHeld, {"holds": 1}, "a wave begins while the group is held"),
        (NeverHearsOfTheEnd, {}, "the coordinator does not know that all are idle"),
        (ForgetsWhoWantsToBeginWhileHeld, {"holds": 1}, "this may go on for ever|has requests that nobody computes"),
        (GoesOnInABrokenGeneration, {"failures": 1}, "nothing can happen any more"),
        (KeepsTheGeneration, {"deaths": 1}, "steps in a wave that the coordinator has not begun"),
        (RearmedByALateStart, {}, "steps in a wave that the coordinator has not begun"),
        (IgnoresStartsWhileHeld, {"holds": 1}, "does not come to rest"),
        (LeavesItselfOut, {}, "nothing can happen any more"),
        (StartsByItself, {}, "steps in a wave that the coordinator has not begun"),
        (SaysNothing, {}, "has requests that nobody computes"),
        (SaysNothingBeforeTheFirstWave, {}, "has requests that nobody computes"),
        (PausesWhenItHasNoWorkItself, {"requests": ((2,), (1,))}, "nothing can happen any more"),
        (KeepsItsWave, {"requests": ((1,), (1,)), "failures": 1}, "steps in a wave that the coordinator has not begun"),
        (CountsStepsSinceItsOwnStart, {"requests": ((2,),), "deaths": 1}, "different operations at once"),
        (VotesForWorkThoughHeld, {"holds": 1}, "steps on though there is nothing to do"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_machine_is_found_out(machine: type, settings: dict[str, object], defect: str) -> None:
    with pytest.raises(CounterExample, match=defect):
        model_of(machine, **settings).check()


@pytest.mark.parametrize("machine", [WakesForEveryRequest, NeverWakes])
def test_what_clients_say_only_saves_time(machine: type) -> None:
    model_of(machine, requests=ONE_STEP_EACH, forgets=True).check()


def test_a_counter_example_says_what_happened() -> None:
    with pytest.raises(CounterExample) as raised:
        model_of(SaysNothing).check()
    lines = str(raised.value).splitlines()
    assert lines[0] == "nothing can happen any more, and engine 0 has requests that nobody computes"
    assert lines[1:] == [
        "   1. client 0 sends a request to engine 0, and None",
        "   2. engine 0 gets a request of 1 steps",
    ]


# --- the model checker itself, on systems that anybody can see through


class Counter:
    """Counts to `end`, and then perhaps begins again. Seven is wrong, and three is nothing to end with."""

    def __init__(self, end: int, *, wraps: bool = False, is_superstitious: bool = True) -> None:
        self.end = end
        self.wraps = wraps
        self.is_superstitious = is_superstitious

    def start(self) -> int:
        return 0

    def successors(self, state: int) -> list[tuple[str, int]]:
        if state == self.end:
            return [("wrap", 0)] if self.wraps else []
        return [("up", state + 1)]

    def canonical(self, state: int) -> int:
        return state

    def find_defect(self, state: int) -> str | None:
        return "it is seven" if state == 7 and self.is_superstitious else None

    def find_unfinished(self, state: int) -> str | None:
        return "it is three" if state == 3 else None


def test_the_explorer_counts() -> None:
    assert explore(Counter(5), 20) == Explored(num_states=6, num_transitions=5, num_ends=1)


@pytest.mark.parametrize(
    ("system", "message"),
    [
        (Counter(3), "nothing can happen any more, and it is three\n   1. up\n   2. up\n   3. up"),
        (Counter(9), "it is seven\n"),
        (Counter(4, wraps=True), "this may go on for ever"),
        (Counter(10**9, is_superstitious=False), "no end after 20 states"),
    ],
)
def test_the_explorer_finds(system: Counter, message: str) -> None:
    with pytest.raises(CounterExample) as raised:
        explore(system, 20)
    assert str(raised.value).startswith(message)
