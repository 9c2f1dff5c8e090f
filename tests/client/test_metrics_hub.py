"""Rounds over all clients, and what becomes of counts when connections are lost: real sockets, one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asyncscale import messages
from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.engines import AttachedEngines
from asyncscale.client.metrics_hub import MetricsHub
from asyncscale.client.options import Limits
from asyncscale.client.policies import least_loaded
from asyncscale.metrics.catalog import ENGINE_LAYOUT, REQUEST_LAYOUT
from asyncscale.metrics.request_counters import RequestCounters, client_id
from asyncscale.metrics.snapshot import DEPARTED, Counts

MakeFleet = Callable[[int], Awaitable[Any]]
TOKENS = REQUEST_LAYOUT.at("tokens_received")
A, B = b"ca", b"cb"


def report(tokens: int, round_id: int | None = None) -> messages.MetricsReport:
    row = REQUEST_LAYOUT.zeros()
    row[TOKENS] = tokens
    return messages.MetricsReport({None: row}, round_id)


def tokens(counts: Counts) -> dict[str, int]:
    return {client: sum(row[TOKENS] for row in rows.values()) for client, rows in counts.clients.items()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> tuple[MetricsHub, list[int]]:
    """With two clients, the ids of the rounds that they were asked in, and patience."""
    monkeypatch.setattr("asyncscale.client.metrics_hub.ROUND_TIMEOUT_S", 1e6)
    hub, asked = MetricsHub(RequestCounters(b"the owner")), []

    def ask(message: messages.MetricsRound) -> set[bytes]:
        asked.append(message.round_id)
        return {A, B}

    hub.ask = ask
    hub.on_attach(A)
    hub.on_attach(B)
    return hub, asked


@asynccontextmanager
async def attached(fleet: Any) -> AsyncIterator[AttachedEngines]:
    """A client's side of the fleet's coordinator."""
    identity = b"c" * messages.CLIENT_ID_SIZE
    dispatcher = Dispatcher(fleet.context, identity, least_loaded, Limits())
    engines = AttachedEngines(fleet.context, identity, fleet.coordinator.address, dispatcher)
    try:
        await engines.start()
        yield engines
    finally:
        dispatcher.close(RuntimeError("the test is over"))
        await engines.stop()


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_round_ends_when_all_have_answered_or_left(hub: tuple[MetricsHub, list[int]]) -> None:
    hub_, asked = hub
    running = asyncio.ensure_future(hub_.run_round())
    await turns()
    hub_.on_report(A, report(3, asked[0]))
    hub_.on_report(B, report(4))  # was under way when the round began
    await turns()
    assert not running.done()
    hub_.on_leave(B, for_good=False)
    await asyncio.wait_for(running, 10)
    assert tokens(hub_.counts()) == {client_id(b"the owner"): 0, client_id(A): 3, DEPARTED: 4}
    hub_.on_report(A, report(5, asked[0]))  # late, and counts all the same
    assert tokens(hub_.counts())[client_id(A)] == 5


async def test_who_asks_during_a_round_shares_the_next(hub: tuple[MetricsHub, list[int]]) -> None:
    hub_, asked = hub
    first = asyncio.ensure_future(hub_.run_round())
    await turns()
    others = [asyncio.ensure_future(hub_.run_round()) for _ in range(3)]
    await turns()
    assert len(asked) == 1
    others[0].cancel()  # the others still want to know
    hub_.on_report(A, report(1, asked[0]))
    hub_.on_report(B, report(1, asked[0]))
    await first
    await turns()
    assert len(asked) == 2
    assert not any(other.done() for other in others[1:])
    hub_.on_report(A, report(1, asked[1]))
    hub_.on_report(B, report(1, asked[1]))
    await asyncio.gather(*others[1:])


async def test_the_end_ends_rounds(hub: tuple[MetricsHub, list[int]]) -> None:
    hub_, _ = hub
    running = asyncio.ensure_future(hub_.run_round())
    await turns()
    hub_.close()
    await asyncio.wait_for(running, 10)


async def test_rows_of_engines_that_there_never_were_are_dropped(hub: tuple[MetricsHub, list[int]]) -> None:
    hub_, _ = hub
    hub_.engines.up(0, "/nowhere")
    row = REQUEST_LAYOUT.zeros()
    hub_.on_report(A, messages.MetricsReport({None: row, 0: row, 1: row}))
    assert hub_.counts().clients[client_id(A)].keys() == {None, 0}


async def test_a_client_whose_connection_was_lost_is_counted_once(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    scissors = fleet.coordinator_scissors()
    async with attached(fleet) as engines:
        own, hub = engines._dispatcher.counters, fleet.coordinator._metrics
        own.received(0, 5, 0.1, 5)
        await engines.fresh_counts()
        assert tokens(hub.counts())[own.client_id] == 0  # of an engine that the owner's books do not know
        hub.engines.up(0, "/nowhere")
        own.received(0, 5, 0.1, 5)
        assert tokens(await engines.fresh_counts())[own.client_id] == 10
        connection = next(iter(fleet.coordinator._clients))
        scissors.cut()
        await fleet.until(lambda: fleet.coordinator._clients.keys() - {connection} != set())
        own.received(0, 5, 0.1, 5)
        seen = tokens(await engines.fresh_counts())
        assert (seen[own.client_id], seen[DEPARTED]) == (15, 0)
        assert tokens(hub.counts()) == seen
    await fleet.until(lambda: tokens(hub.counts())[DEPARTED] == 15)


async def test_a_report_that_was_lost_with_its_connection_is_made_again(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    scissors = fleet.coordinator_scissors()
    async with attached(fleet) as engines:
        link, hub = engines._metrics, fleet.coordinator._metrics
        hub.engines.up(0, "/nowhere")
        await fleet.until(lambda: link._reporting is None)
        engines._dispatcher.counters._rows[None].cells[TOKENS] = 5
        send, link._send = link._send, lambda message: None
        link.report()
        link._send = send
        scissors.cut()
        await fleet.until(lambda: tokens(hub.counts()).get(engines._dispatcher.counters.client_id) == 5)


async def test_an_engine_that_dies_before_its_owner_was_asked_does_not_vanish(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(2)
    async with attached(fleet) as engines:

        def up() -> dict[int, int]:
            return {key: row[ENGINE_LAYOUT.at("engine_up")] for key, row in engines.counts().engines.items()}

        assert up() == {0: 1, 1: 1}
        fleet.kill(fleet.engines[0])
        await fleet.until(lambda: 0 not in engines.roster)
        assert up() == {0: 0, 1: 1}


async def test_an_idle_client_says_nothing(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    async with attached(fleet) as engines:
        link = engines._metrics
        engines._dispatcher.counters.received(0, 5, 0.1, 5)
        await fleet.until(lambda: link._reporting is None)  # it has reported, and found nothing new since
        assert link._reported == engines._dispatcher.counters.rows()
        assert link._querying is None  # nobody looked


async def test_who_has_looked_once_is_told_from_then_on(make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncscale.client.metrics_link._QUERY_INTERVAL_S", 0.01)
    fleet = await make_fleet(1)
    async with attached(fleet) as engines:
        hub, link = fleet.coordinator._metrics, engines._metrics
        engines.counts()
        for expected in (1, 2):  # without a look in between
            hub._own._rows[None].cells[TOKENS] = expected
            await fleet.until(lambda: tokens(link._newest).get(hub._own.client_id) == expected)  # noqa: B023


async def test_who_does_not_hear_of_the_owner_gives_what_it_knows(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncscale.client.metrics_link._ANSWER_TIMEOUT_S", 0.05)
    fleet = await make_fleet(1)
    async with attached(fleet) as engines:
        engines._dispatcher.counters.received(0, 5, 0.1, 5)
        monkeypatch.setattr(fleet.coordinator, "_query", lambda identity, query: None)
        counts = await engines.fresh_counts()
        assert tokens(counts) == {engines._dispatcher.counters.client_id: 5}
        assert counts.engines.keys() == {0}
