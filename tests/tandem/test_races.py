"""Races that engines in tandem have been seen to lose, each by itself."""

from __future__ import annotations

from collections import deque

import pytest

from asyncscale.tandem.client import ClientWaves
from asyncscale.tandem.coordinator import CoordinatorWaves
from asyncscale.tandem.engine import EngineWaves
from asyncscale.tandem.messages import GroupState, Paused, Wake


class Group:
    """Engines, a coordinator and a client; messages to engines arrive when a test says so."""

    def __init__(self, num_engines: int = 2, sync_interval: int = 4) -> None:
        self.sync_interval = sync_interval
        self.coordinator = CoordinatorWaves(num_engines)
        self.engines = [EngineWaves(sync_interval) for _ in range(num_engines)]
        self.work = [0] * num_engines  # steps to do
        self.inboxes: list[deque[GroupState]] = [deque() for _ in range(num_engines)]
        self.client = ClientWaves()
        for engine_id in range(num_engines):
            self.send(self.coordinator.engine_joined(engine_id))
        self.arrive()

    def send(self, state: GroupState | None) -> None:
        if state is not None:
            for inbox in self.inboxes:
                inbox.append(state)
            self.client.on_group_state(state)

    def arrive(self, *engine_ids: int) -> None:
        """What was sent to these engines arrives; to all if none is named. Those that are to join meet."""
        for engine_id in engine_ids or range(len(self.engines)):
            while self.inboxes[engine_id]:
                self.engines[engine_id].on_group_state(self.inboxes[engine_id].popleft())
        joining = {engine.generation_to_join for engine in self.engines}
        if len(joining) == 1 and (generation := joining.pop()) is not None:
            for engine in self.engines:
                engine.joined(generation)

    def request(self, engine_id: int, steps: int = 1, *, wake: Wake | None = None) -> None:
        self.work[engine_id] += steps
        if wake is not None:
            self.send(self.coordinator.on_wake(wake))

    def report(self, *engine_ids: int) -> bool:
        """These engines tell what is to be told, or all do. Whether there was anything."""
        reports = [self.engines[i].report(self.work[i] > 0) for i in engine_ids or range(len(self.engines))]
        for report in reports:
            if report is not None:
                self.send(self.coordinator.on_report(report))
        return any(reports)

    def step(self) -> None:
        """One step of all, and an agreement if it is time for one. Fails the test if one of them would be alone."""
        assert all(engine.running for engine in self.engines), "an engine steps alone"
        assert len({(engine.generation, engine.wave, engine.num_steps) for engine in self.engines}) == 1
        self.work = [max(0, steps - 1) for steps in self.work]
        compares = {engine.step_done() for engine in self.engines}
        assert len(compares) == 1, "an engine compares notes alone"
        if compares.pop():
            go_on = any(engine.vote(steps > 0) for engine, steps in zip(self.engines, self.work, strict=True))
            for engine in self.engines:
                engine.agreed(go_on)

    def run(self) -> int:
        """Until all pause and nothing is under way. Returns the number of steps."""
        num_steps = 0
        while True:
            while self.report() or any(self.inboxes):
                self.arrive()
            if not any(engine.running for engine in self.engines):
                return num_steps
            self.step()
            num_steps += 1

    @property
    def waves(self) -> list[tuple[int, int]]:
        return [(engine.generation, engine.wave) for engine in self.engines]

    def restart(self, engine_id: int) -> None:
        """An engine dies in a step, and comes back; the step of the others fails."""
        for other, engine in enumerate(self.engines):
            if other != engine_id and engine.running:
                engine.broke(engine.generation)
        self.engines[engine_id] = EngineWaves(self.sync_interval)
        self.send(self.coordinator.engine_died(engine_id))
        self.inboxes[engine_id].clear()
        self.send(self.coordinator.engine_joined(engine_id))
        self.arrive()


def test_a_request_crosses_a_pause() -> None:
    """The client believes that they run, and wakes nobody; when the request arrives, they have stopped."""
    group = Group()
    group.request(0, wake=Wake(1, 0))
    group.arrive()
    assert group.client.request_sent() is None
    assert group.run() == 1
    assert not any(engine.running for engine in group.engines)
    group.request(0)
    group.run()
    assert group.work == [0, 0]
    assert group.coordinator.idle


@pytest.mark.parametrize("late", [Wake(1, 0), Paused(1, 0, True)])
def test_a_wave_number_that_is_stale_begins_no_wave(late: Wake | Paused) -> None:
    group = Group()
    group.request(0, wake=Wake(1, 0))
    group.run()
    before = group.coordinator.state
    state = group.coordinator.on_wake(late) if isinstance(late, Wake) else group.coordinator.on_report(late)
    assert state is None
    assert group.coordinator.state == before


def test_the_sender_is_not_left_out_of_its_own_wake_up() -> None:
    group = Group(3)
    group.request(1, steps=2)
    group.report()
    assert [inbox[-1].running for inbox in group.inboxes] == [True] * 3
    group.arrive()
    assert all(engine.running for engine in group.engines)
    group.run()
    assert group.work == [0, 0, 0]


def test_no_engine_starts_by_its_own_word() -> None:
    """It would be alone if the group is held, or if its word is lost."""
    group = Group()
    group.request(1)
    group.report(1)
    assert not group.engines[1].running


def test_a_late_start_does_not_rearm_engines_that_pause() -> None:
    group = Group()
    group.request(0, wake=Wake(1, 0))
    start = group.inboxes[1][-1]
    assert start.running
    group.run()
    group.send(group.coordinator.hold("somebody"))
    group.arrive()
    assert group.coordinator.at_rest
    for late in (start, GroupState(99, 1, whole=True, wave=0, running=True)):
        group.engines[1].on_group_state(late)
        assert not group.engines[1].running


def test_a_start_that_crosses_a_hold_is_followed_by_all_and_comes_to_rest() -> None:
    """Or one that has got the start first would wait in a step for one that has got the hold first."""
    group = Group()
    group.request(0, steps=100, wake=Wake(1, 0))
    group.arrive(0)
    group.send(group.coordinator.hold("somebody"))
    assert not group.coordinator.at_rest
    group.arrive()
    assert all(engine.running for engine in group.engines)
    group.run()
    assert group.coordinator.at_rest
    assert group.work == [99, 0]
    group.send(group.coordinator.release("somebody"))
    group.run()
    assert group.work == [0, 0]


def test_a_held_group_is_not_woken_and_forgets_no_request() -> None:
    group = Group()
    group.send(group.coordinator.hold("somebody"))
    group.request(0, wake=Wake(1, 0))
    group.request(1)
    assert group.run() == 0
    assert group.coordinator.at_rest
    group.send(group.coordinator.release("somebody"))
    group.run()
    assert group.work == [0, 0]


def test_who_holds_twice_releases_once_and_not_for_others() -> None:
    group = Group()
    for holder in ("a", "a", "b"):
        group.send(group.coordinator.hold(holder))
    group.send(group.coordinator.release("a"))
    assert group.coordinator.at_rest
    group.send(group.coordinator.release("a"))
    assert group.coordinator.at_rest
    group.send(group.coordinator.release("b"))
    assert not group.coordinator.at_rest


def test_drain_does_not_wait_for_a_wave_that_nobody_confirmed() -> None:
    """The start is under way when an engine dies; nobody ever steps in that wave."""
    group = Group()
    group.request(0, wake=Wake(1, 0))
    assert not group.coordinator.idle
    group.work[0] = 0  # its client has it back
    group.restart(0)
    group.run()
    assert group.coordinator.idle


def test_drain_ends_when_the_request_of_a_start_was_aborted() -> None:
    group = Group()
    group.request(0, wake=Wake(1, 0))
    group.work[0] = 0
    assert group.run() == 1
    assert group.coordinator.idle


@pytest.mark.parametrize("wake", [Wake(1, 0), None], ids=["client", "engine"])
def test_the_first_wave_starts(wake: Wake | None) -> None:
    group = Group()
    assert group.waves == [(1, 0), (1, 0)]
    assert group.client.request_sent() == Wake(1, 0)
    group.request(1, wake=wake)
    group.run()
    assert group.work == [0, 0]
    assert group.waves == [(1, 1), (1, 1)]


def test_a_request_that_comes_before_the_group_stands_is_computed() -> None:
    group = Group(2)
    group.restart(0)
    engine = EngineWaves()
    assert engine.report(True) is None  # to whom, and of which wave?
    group.request(1)
    group.run()
    assert group.work == [0, 0]


def test_an_engine_joins_at_wave_zero_and_so_do_all_others() -> None:
    group = Group()
    for _ in range(5):
        group.request(0)
        group.run()
    assert group.waves == [(1, 5), (1, 5)]
    group.restart(1)
    assert group.waves == [(2, 0), (2, 0)]
    group.request(0)
    group.run()
    assert group.waves == [(2, 1), (2, 1)]
    for late in (Paused(1, 6, True), Paused(1, 1, True), Paused(1, 2, False)):
        assert group.coordinator.on_report(late) is None


def test_an_engine_that_comes_back_joins_nothing_that_it_is_no_part_of() -> None:
    group = Group(3)
    for engine_id in (0, 1):
        group.send(group.coordinator.engine_died(engine_id))
    assert group.coordinator.engine_joined(0) is None
    newcomer = EngineWaves()
    newcomer.on_group_state(group.coordinator.state)
    assert newcomer.generation_to_join is None
    state = group.coordinator.engine_joined(1)
    assert state is not None
    newcomer.on_group_state(state)
    assert newcomer.generation_to_join == 2


def test_steps_are_counted_within_the_wave_and_not_over_engines_lives() -> None:
    """An engine that was started again has made fewer steps in all, and must compare notes at the same ones."""
    group = Group(sync_interval=3)
    group.request(0, steps=5)
    assert group.run() == 7  # agreed after 1, 4, 7
    group.request(0, steps=100, wake=Wake(1, 1))
    group.arrive()
    for _ in range(3):
        group.step()
    group.restart(1)
    group.request(1)
    group.run()  # checks it at each step
    assert group.work == [0, 0]


def test_reports_of_engines_are_not_ordered_among_each_other() -> None:
    """One says that it pauses before wave 1 with work, and then another's older word arrives, and then its newer."""
    group = Group()
    group.request(0, wake=Wake(1, 0))
    group.arrive()
    group.step()
    group.work[1] = 1
    group.report(1)
    assert (group.coordinator.state.wave, group.coordinator.state.running) == (1, True)
    assert group.coordinator.on_report(Paused(1, 0, True)) is None
    group.report(0)
    assert (group.coordinator.state.wave, group.coordinator.state.running) == (1, True)
    group.run()
    assert group.work == [0, 0]


def test_a_wave_that_nobody_needs_is_one_step_long() -> None:
    group = Group(sync_interval=16)
    group.request(0, wake=Wake(1, 0))
    group.work[0] = 0
    assert group.run() == 1


def test_engines_pause_when_idle_after_few_steps() -> None:
    group = Group(sync_interval=4)
    group.request(0, steps=2)
    assert group.run() == 5
    assert group.coordinator.idle


def test_each_wave_is_woken_by_a_client_once() -> None:
    client = ClientWaves()
    assert client.request_sent() is None  # it knows of no engines
    client.on_group_state(GroupState(4, 2, whole=True, wave=3))
    assert client.request_sent() == Wake(2, 3)
    assert client.request_sent() is None
    client.on_group_state(GroupState(3, 2, whole=True, wave=2))  # late
    assert client.request_sent() is None
    client.on_group_state(GroupState(5, 2, whole=True, wave=3, running=True))
    client.on_group_state(GroupState(6, 2, whole=True, wave=4))
    assert client.request_sent() == Wake(2, 4)


def test_a_generation_that_breaks_is_formed_anew_at_once_when_nobody_died() -> None:
    group = Group()
    group.request(0, steps=3, wake=Wake(1, 0))
    group.arrive()
    group.step()
    for engine in group.engines:
        engine.broke(engine.generation)
    group.run()
    assert group.work == [0, 0]
    assert group.waves[0][0] == group.waves[1][0] == 2


def test_a_sync_interval_is_at_least_one_step() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        EngineWaves(0)
