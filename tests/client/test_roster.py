"""Who is there and who is not, whatever order the news come in."""

from __future__ import annotations

import msgspec

from asyncscale import messages
from asyncscale.client.roster import Roster
from asyncscale.errors import EngineDeadError

LOAD = messages.Load(0, 0, 0, 0, 0, 0, 0, 1000)
FACTS = messages.EngineFacts(32_000, 8192, 64, 16, 1000, "simulated", 0.0)


class Dispatcher:
    """Records what it is told: ("join", id) and ("leave", id, returns)."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def join(self, member: messages.Member) -> None:
        self.told.append(("join", member.engine_id))

    def leave(self, error: EngineDeadError, *, returns: bool) -> None:
        self.told.append(("leave", error.engine_id, returns))

    def report(self, engine_id: int, load: messages.Load) -> None:
        self.told.append(("report", engine_id))


def make() -> tuple[Roster, Dispatcher]:
    dispatcher = Dispatcher()
    return Roster(dispatcher), dispatcher  # type: ignore[arg-type]


def member(engine_id: int, incarnation: int = 0, last_error: str | None = None) -> messages.Member:
    return messages.Member(engine_id, incarnation, "ipc:///nowhere", FACTS, LOAD, last_error)


def left(engine_id: int, incarnation: int = 0, returns: bool = True) -> messages.Left:
    return messages.Left(engine_id, incarnation, f"engine {engine_id} died", -9, "", returns)


def states(roster: Roster) -> list[tuple[int, str, int]]:
    return [(engine.engine_id, engine.state, engine.restarts) for engine in roster.health()]


def test_a_life_a_death_and_a_life_after_it() -> None:
    roster, dispatcher = make()
    roster.join(member(1))
    roster.join(member(0))
    assert states(roster) == [(0, "ready", 0), (1, "ready", 0)]
    assert roster.leave(left(0))
    assert states(roster) == [(0, "restarting", 0), (1, "ready", 0)]
    assert roster.health()[0].last_error == "engine 0 died"
    roster.join(member(0, 1, "engine 0 died"))
    assert states(roster) == [(0, "ready", 1), (1, "ready", 0)]
    assert roster.health()[0].last_error == "engine 0 died"
    assert dispatcher.told == [("join", 1), ("join", 0), ("leave", 0, True), ("join", 0)]


def test_late_news_of_an_incarnation_that_was_replaced_change_nothing() -> None:
    roster, dispatcher = make()
    roster.join(member(0, 2))
    assert not roster.leave(left(0, 1))
    assert states(roster) == [(0, "ready", 2)]
    assert dispatcher.told == [("join", 0)]


def test_one_that_is_given_up_after_its_death() -> None:
    roster, dispatcher = make()
    roster.join(member(0))
    roster.leave(left(0))
    roster.leave(left(0, 1))
    roster.leave(left(0, 2, returns=False))
    assert states(roster) == [(0, "dead", 2)]
    assert dispatcher.told[-1] == ("leave", 0, False)


def test_a_welcome_stands_for_everything_that_was_missed() -> None:
    roster, dispatcher = make()
    for engine_id in range(4):
        roster.join(member(engine_id))
    dispatcher.told.clear()
    # 0 stayed; 1 died; 2 died and is back; 3 is gone without a trace; 4 is new.
    roster.replace([member(0), member(2, 1), member(4)], [left(1)])
    assert states(roster) == [
        (0, "ready", 0),
        (1, "restarting", 0),
        (2, "ready", 1),
        (3, "restarting", 0),
        (4, "ready", 0),
    ]
    assert ("report", 0) in dispatcher.told
    assert [event for event in dispatcher.told if event[1] == 2] == [("leave", 2, True), ("join", 2)]
    assert ("join", 4) in dispatcher.told


def test_when_the_owner_is_gone_nobody_returns() -> None:
    roster, dispatcher = make()
    roster.join(member(0))
    roster.join(member(1))
    roster.leave(left(1))
    roster.leave_all("its owner died")
    assert [engine.state for engine in roster.health()] == ["dead", "dead"]
    assert {event for event in dispatcher.told if event[0] == "leave"} >= {("leave", 0, False), ("leave", 1, False)}


def test_health_is_a_value() -> None:
    roster, _ = make()
    roster.join(member(0))
    (health,) = roster.health()
    assert health.last_step_age is None
    assert msgspec.structs.asdict(health)["state"] == "ready"
