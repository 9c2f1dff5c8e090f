"""Real engine cores over the simulated model, in lockstep: a thread for each engine, no sockets."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import pytest
from group_processes import Engine as EngineProcess

from asyncscale.config import EngineConfig, SimulatedModel
from asyncscale.engine.core import EngineCore
from asyncscale.messages import Add, Finished, Outputs
from asyncscale.model.simulation import SimulatedRunner
from asyncscale.params import Sampling
from asyncscale.tandem.client import ClientWaves
from asyncscale.tandem.collective_errors import CollectiveError, SteppedAloneError
from asyncscale.tandem.coordinator import CoordinatorWaves
from asyncscale.tandem.core import TandemCore
from asyncscale.tandem.engine import EngineWaves
from asyncscale.tandem.lockstep import LockstepGroup, LockstepRunner
from asyncscale.tandem.meeting import Meeting, close_meeting, open_meeting
from asyncscale.tandem.messages import FromTandemEngine, GroupState, Paused
from asyncscale.transport import choose_runtime_folder, make_runtime_folder, remove_runtime_folder

MODEL = SimulatedModel(base_ms=0, decode_us=0, prefill_us=0, vocab_size=1000)
CONFIG = EngineConfig(max_num_seqs=4, max_model_len=512, num_kv_blocks=400, max_num_batched_tokens=64)
CLIENT = b"a"
WAIT_S = 60.0  # for what must come; nobody waits so long


class Death(BaseException):
    """Of an engine, in the middle of a step."""


class Engine:
    """An engine's thread: takes what is in its inbox, steps, tells what is to be told."""

    def __init__(self, engine_id: int, group: Group, waves: EngineWaves) -> None:
        self.engine_id = engine_id
        self.inbox: SimpleQueue[GroupState | Add | None] = SimpleQueue()
        self.steps_to_live: int | None = None
        self._group = group
        self._lockstep = LockstepGroup(group.folder, engine_id, group.num_engines, timeout=group.timeout)
        runner = LockstepRunner(MODEL, CONFIG, self._lockstep)
        self._core = EngineCore(runner, CONFIG)
        self.tandem = TandemCore(self._core, runner, self._lockstep, waves)
        self.thread = threading.Thread(target=self._run, name=f"engine {engine_id}")
        self.thread.start()

    def _run(self) -> None:
        try:
            while self._take():
                self.tandem.follow()
                if self.tandem.running:
                    self._step()
                report = self.tandem.report()
                if report is not None:
                    self._group.events.put((self.engine_id, report))
        except BaseException as error:
            self._group.events.put((self.engine_id, error))
        finally:
            self._lockstep.leave()  # as a process that ends

    def _take(self) -> bool:
        """All that has arrived; blocks while the engine pauses. False at the end."""
        while not self.tandem.running or not self.inbox.empty():
            match self.inbox.get():
                case None:
                    return False
                case GroupState() as state:
                    self.tandem.on_group_state(state)
                case Add() as request:
                    self._core.add(CLIENT, request)
            if self.inbox.empty():
                break
        return True

    def _step(self) -> None:
        outputs = self.tandem.step(self._die_in_time)
        self._core.check_integrity()
        for output in outputs.values():
            self._group.events.put((self.engine_id, output))

    def _die_in_time(self) -> None:
        if self.steps_to_live is not None:
            self.steps_to_live -= 1
            if self.steps_to_live < 0:
                raise Death


@dataclass
class Received:
    engine_id: int
    request: Add
    token_ids: list[int] = field(default_factory=list)
    finished: Finished | None = None


class Group:
    """Engines, and in the test's own thread their coordinator, supervisor and client."""

    def __init__(self, folder: str, num_engines: int, make_waves: Callable[[int], EngineWaves], timeout: float) -> None:
        self.folder = folder
        self.num_engines = num_engines
        self.timeout = timeout
        self.make_waves = make_waves
        self.events: SimpleQueue[tuple[int, FromTandemEngine | Outputs | BaseException]] = SimpleQueue()
        self.coordinator = CoordinatorWaves(num_engines)
        self.client = ClientWaves()
        self.requests: dict[int, Received] = {}
        self.num_deaths = 0
        self._meeting = 0  # the generation that meets
        self.engines = {i: Engine(i, self, make_waves(i)) for i in range(num_engines)}
        for engine_id in range(num_engines):
            self.send(self.coordinator.engine_joined(engine_id))

    def send(self, state: GroupState | None) -> None:
        if state is not None:
            self._keep_meeting(state)
            for engine in self.engines.values():
                engine.inbox.put(state)
            self.client.on_group_state(state)

    def _keep_meeting(self, state: GroupState) -> None:
        is_met = state.whole and state.generation == self._meeting
        if self._meeting and not is_met:
            close_meeting(self.folder, self._meeting)
            self._meeting = 0
        if state.whole and not is_met:
            open_meeting(self.folder, state.generation)
            self._meeting = state.generation

    def request(self, engine_id: int, num_tokens: int) -> None:
        request_id = len(self.requests)
        prompt = np.arange(300, 310 + request_id, dtype="<i4")
        sampling = Sampling(max_tokens=num_tokens, temperature=1.0, seed=request_id)
        self.requests[request_id] = Received(engine_id, Add(request_id, prompt.tobytes(), len(prompt), sampling))
        wake = self.client.request_sent()
        if wake is not None:
            self.send(self.coordinator.on_wake(wake))
        self.engines[engine_id].inbox.put(self.requests[request_id].request)

    def wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            engine_id, event = self.events.get(timeout=WAIT_S)
            match event:
                case Outputs():
                    self._receive(event)
                case Death():
                    self._restart(engine_id)
                case BaseException():
                    raise event
                case _:
                    self.send(self.coordinator.on_report(event))

    def _receive(self, outputs: Outputs) -> None:
        for request_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
            self.requests[request_id].token_ids.append(token_id)
        for finished in outputs.finished:
            assert self.requests[finished.request_id].finished is None
            self.requests[finished.request_id].finished = finished

    def _restart(self, dead: int) -> None:
        """Its requests go to another engine, from their beginning."""
        self.num_deaths += 1
        self.send(self.coordinator.engine_died(dead))
        for received in self.requests.values():
            if received.engine_id == dead and received.finished is None:
                received.engine_id, received.token_ids = 1 - dead, []
                self.engines[1 - dead].inbox.put(received.request)
        self.engines[dead] = Engine(dead, self, self.make_waves(dead))
        self.send(self.coordinator.engine_joined(dead))

    def wait_done(self) -> None:
        self.wait(lambda: all(received.finished for received in self.requests.values()) and self.coordinator.idle)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.inbox.put(None)
        for engine in self.engines.values():
            engine.thread.join(WAIT_S)
            assert not engine.thread.is_alive()

    def check_tokens(self) -> None:
        """They are those of an engine that is alone with the request."""
        for received in self.requests.values():
            core = EngineCore(SimulatedRunner(MODEL, CONFIG), CONFIG)
            core.add(CLIENT, received.request)
            token_ids: list[int] = []
            while core.has_work:
                for output in core.step().values():
                    token_ids += output.token_ids
            assert received.token_ids == token_ids


@pytest.fixture
def folder() -> Iterator[str]:
    path = choose_runtime_folder()
    make_runtime_folder(path)
    yield path
    remove_runtime_folder(path)


@pytest.fixture
def make_group(folder: str) -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def make(
        num_engines: int = 2,
        make_waves: Callable[[int], EngineWaves] = lambda engine_id: EngineWaves(4),
        timeout: float = WAIT_S,
    ) -> Group:
        groups.append(Group(folder, num_engines, make_waves, timeout))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


@pytest.mark.parametrize("num_engines", [1, 2, 3])
def test_requests_anywhere_at_any_time(make_group: Callable[..., Group], num_engines: int) -> None:
    group, rng = make_group(num_engines), random.Random(num_engines)
    for _ in range(20):
        for _ in range(rng.randrange(4)):
            group.request(rng.randrange(num_engines), rng.randrange(1, 30))
        if rng.random() < 0.5:
            group.wait_done()
    group.wait_done()
    group.check_tokens()


def test_an_engine_without_requests_makes_dummy_steps(make_group: Callable[..., Group]) -> None:
    group = make_group()
    for _ in range(3):
        group.request(1, 10)
    group.wait_done()
    group.close()
    assert group.engines[0].tandem.position == group.engines[1].tandem.position
    assert group.engines[0].tandem.num_dummies >= 10
    assert group.engines[1].tandem.num_dummies <= 4
    group.check_tokens()


def test_held_engines_stand_at_one_step_and_go_on_later(make_group: Callable[..., Group]) -> None:
    group = make_group()
    group.request(0, 400)
    group.request(1, 400)
    group.wait(lambda: all(len(received.token_ids) > 10 for received in group.requests.values()))
    group.send(group.coordinator.hold("test"))
    group.wait(lambda: group.coordinator.at_rest)
    assert not any(received.finished for received in group.requests.values())
    group.request(0, 5)
    group.send(group.coordinator.release("test"))
    group.wait_done()
    group.check_tokens()


@pytest.mark.parametrize("dead", [0, 1])
def test_an_engine_dies_in_a_step_and_every_request_goes_on(make_group: Callable[..., Group], dead: int) -> None:
    group = make_group()
    group.engines[dead].steps_to_live = 7
    for engine_id in (0, 1, 0, 1):
        group.request(engine_id, 40)
    group.wait_done()
    assert group.num_deaths == 1
    assert group.coordinator.state.generation >= 2
    group.check_tokens()


# --- what lockstep is for: to fail


class StartsByItself(EngineWaves):
    __slots__ = ()

    def report(self, has_work: bool) -> FromTandemEngine | None:
        report = super().report(has_work)
        if isinstance(report, Paused) and has_work:
            self.running = True
        return report


def test_an_engine_that_steps_alone_fails_the_test(make_group: Callable[..., Group]) -> None:
    group = make_group(make_waves=lambda engine_id: StartsByItself(4), timeout=0.5)
    group.send(group.coordinator.hold("test"))
    group.request(1, 5)
    with pytest.raises(SteppedAloneError, match="alone in"):
        group.wait_done()


def test_engines_that_are_out_of_step_fail_the_test(make_group: Callable[..., Group]) -> None:
    group = make_group(make_waves=lambda engine_id: EngineWaves(3 + engine_id))
    group.request(0, 20)
    with pytest.raises(SteppedAloneError, match="any"):
        group.wait_done()


def test_who_waits_in_a_generation_that_ends_is_told(folder: str) -> None:
    errors: SimpleQueue[Exception] = SimpleQueue()

    def join(group: LockstepGroup) -> None:
        try:
            group.join(1)
        except CollectiveError as error:
            errors.put(error)

    open_meeting(folder, 1)
    thread = threading.Thread(target=join, args=[LockstepGroup(folder, 0, 2)])
    thread.start()
    Meeting(folder, 1).get("listening")
    close_meeting(folder, 1)
    assert "generation 1 is over" in str(errors.get(timeout=WAIT_S))
    thread.join()
    with pytest.raises(CollectiveError, match="generation 1 is over"):
        LockstepGroup(folder, 1, 2).join(1)


@pytest.mark.parametrize("dead", [0, 2])
def test_processes_notice_that_one_was_killed_and_its_successor_joins(folder: str, dead: int) -> None:
    engines = [EngineProcess("lockstep", folder, i, 3) for i in range(3)]

    def everyone(method: str, *args: object) -> list[object]:
        for engine in engines:
            engine.tell(method, *args)
        return [engine.hear() for engine in engines]

    open_meeting(folder, 1)
    assert everyone("join", 1) == [None] * 3
    assert everyone("step") == [None] * 3
    survivors = [engine for engine in engines if engine is not engines[dead]]
    for engine in survivors:
        engine.tell("step")
    engines[dead].kill()
    for engine in survivors:
        assert engine.hear() == "CollectiveError: another engine of generation 1 is gone"
        engine.tell("leave")
        assert engine.hear() is None
    close_meeting(folder, 1)
    engines[dead].close()
    engines[dead] = EngineProcess("lockstep", folder, dead, 3)
    open_meeting(folder, 2)
    assert everyone("join", 2) == [None] * 3
    engines[1].tell("any", True)
    for engine in (engines[0], engines[2]):
        engine.tell("any", False)
    assert [engine.hear() for engine in engines] == [True] * 3
    for engine in engines:
        engine.close()
