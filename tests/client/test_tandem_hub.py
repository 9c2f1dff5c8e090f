"""The owner's part in the waves, over engines that only say something when a test has them say it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from asyncscale import ClientClosedError, EngineDeadError
from asyncscale.client import tandem_hub
from asyncscale.client.tandem_hub import TandemHub
from asyncscale.tandem.messages import Broken, GroupState, Met, Paused, Wake


class Group:
    """A hub, and what it has told the engines and the clients."""

    def __init__(self, folder: Path, num_engines: int = 2) -> None:
        self.folder = folder
        self.engines_heard: list[GroupState] = []
        self.clients_heard: list[GroupState] = []
        self.hub = TandemHub(num_engines, str(folder), self.engines_heard.append, self.clients_heard.append)
        for engine_id in range(num_engines):
            self.hub.engine_joined(engine_id)

    @property
    def generations(self) -> list[int]:
        """Those that the engines were told of."""
        return sorted({state.generation for state in self.engines_heard if state.whole})

    @property
    def meetings(self) -> list[str]:
        """Where engines can meet now."""
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
async def group(tmp_path: Path) -> Group:
    return Group(tmp_path)


async def passed(*tasks: asyncio.Task[None]) -> None:
    """Everything that can go on without news has gone on."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_engines_and_clients_hear_what_is_decided_and_there_is_a_place_to_meet(group: Group) -> None:
    assert group.engines_heard == group.clients_heard == [GroupState(1, 1, whole=True)]
    assert group.meetings == ["generation-1"]
    group.hub.on_wake(Wake(1, 0))
    assert group.engines_heard[-1].running
    assert group.clients_heard == group.engines_heard


async def test_the_owner_wakes_the_engines_once_for_each_wave(group: Group) -> None:
    for _ in range(3):
        group.hub.request_sent()
    assert [state.running for state in group.engines_heard] == [False, True]
    group.hub.on_report(Paused(1, 1, False))
    group.hub.request_sent()
    assert [(state.wave, state.running) for state in group.engines_heard[2:]] == [(1, False), (1, True)]


async def test_a_death_that_the_others_hear_of_first_rebuilds_the_group_once(group: Group) -> None:
    group.hub.request_sent()
    group.hub.on_report(Broken(1))
    assert group.hub.state.whole  # the dead engine is among them, for all that is known
    group.hub.engine_died(1)
    assert group.meetings == []
    group.hub.on_report(Broken(1))
    group.hub.engine_joined(1)
    assert group.generations == [1, 2]
    assert group.meetings == ["generation-2"]
    assert group.hub._breaking is None


async def test_a_group_of_which_nobody_is_dead_is_formed_anew_all_the_same(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a connection between two of them breaks."""
    monkeypatch.setattr(tandem_hub, "_DEATH_NOTICE_S", 0.001)
    for _ in range(2):
        group.hub.on_report(Broken(1))
    async with asyncio.timeout(10):
        while group.hub.state.generation == 1:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    group.hub.on_report(Broken(1))  # late
    assert group.hub._breaking is None
    assert group.generations == [1, 2]
    assert group.meetings == ["generation-2"]


async def test_rest_comes_when_the_wave_has_ended_and_lasts_until_the_last_holder_leaves(group: Group) -> None:
    hub = group.hub
    hub.on_report(Met(1))
    hub.request_sent()
    first, second = asyncio.ensure_future(hub.hold("a")), asyncio.ensure_future(hub.hold("b"))
    await passed()
    assert not first.done()
    hub.on_report(Paused(1, 1, True))
    await asyncio.gather(first, second)
    hub.release("a")
    assert not hub.state.running
    hub.release("b")
    assert hub.state.running


async def test_there_is_no_rest_before_the_engines_of_a_new_generation_have_met(group: Group) -> None:
    """Some may be in the step that the death of another one will end."""
    hub = group.hub
    hub.on_report(Met(1))
    hub.engine_died(0)
    waiting = asyncio.ensure_future(hub.hold("a"))
    hub.engine_joined(0)
    hub.on_report(Met(1))
    await passed()
    assert hub._waves.at_rest
    assert not waiting.done()
    hub.on_report(Met(2))
    await waiting


async def test_who_is_cancelled_while_it_waits_for_rest_holds_nobody(group: Group) -> None:
    async def rest() -> None:
        async with group.hub.rest():
            raise AssertionError("there is no rest")

    group.hub.request_sent()
    waiting = asyncio.ensure_future(rest())
    await passed()
    assert group.hub.state.held
    waiting.cancel()
    await asyncio.wait([waiting])
    assert not group.hub.state.held
    assert not group.hub._waiters


@pytest.mark.parametrize("error", [ClientClosedError("closed"), EngineDeadError("gone", engine_id=1)])
async def test_the_end_of_the_group_is_the_end_of_waiting_for_rest(group: Group, error: Exception) -> None:
    group.hub.request_sent()
    waiting = asyncio.ensure_future(group.hub.hold("a"))
    await passed()
    group.hub.on_report(Broken(1))
    group.hub.end(error)
    for ended in (waiting, group.hub.hold("b")):
        with pytest.raises(type(error), match=str(error)):
            await ended
    assert group.hub._breaking is None
