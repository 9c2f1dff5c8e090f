"""Whatever clients say, in whatever order they come, are lost, return and leave: each counts once, for ever."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncscale.metrics import client_ledger
from asyncscale.metrics.catalog import REQUEST_LAYOUT as LAYOUT
from asyncscale.metrics.client_ledger import ClientLedger
from asyncscale.metrics.snapshot import DEPARTED, RequestRows

TOKENS, HELD = LAYOUT.at("tokens_received"), LAYOUT.at("num_requests_held")
CLIENTS = st.sampled_from(["a", "b", "c", "d"])
ENGINES = st.sampled_from([None, 0, 1])


def rows(counted: dict[int | None, int], held: int = 0) -> RequestRows:
    """What a client that has received so many tokens reports."""
    made: RequestRows = {}
    for engine_id, tokens in counted.items():
        made[engine_id] = LAYOUT.zeros()
        made[engine_id][TOKENS] = tokens
        made[engine_id][HELD] = held
    return made


def tokens_of(by_engine: RequestRows) -> dict[int | None, int]:
    return {engine_id: row[TOKENS] for engine_id, row in by_engine.items() if row[TOKENS]}


class LedgerMachine(RuleBasedStateMachine):
    """The truth beside it: what each client has reported last over the connection that was its newest then."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = ClientLedger()
        self.num_connections = 0
        self.connections: dict[str, list[bytes]] = {}  # of those that did not say that they leave
        self.open: set[bytes] = set()
        self.counted: dict[str, dict[int | None, int]] = {}
        self.reported: dict[str, dict[int | None, int]] = {}
        self.left: list[dict[int | None, int]] = []
        self.seen: dict[int | None, int] = {}

    @rule(client=CLIENTS)
    def join(self, client: str) -> None:
        self.num_connections += 1
        connection = b"%s-%d" % (client.encode(), self.num_connections)
        self.connections.setdefault(client, []).append(connection)
        self.open.add(connection)
        self.ledger.joined(client, connection)

    @rule(client=CLIENTS, engine=ENGINES, tokens=st.integers(1, 1000))
    def count(self, client: str, engine: int | None, tokens: int) -> None:
        if client in self.connections:
            counted = self.counted.setdefault(client, {})
            counted[engine] = counted.get(engine, 0) + tokens

    @rule(client=CLIENTS, data=st.data())
    def report(self, client: str, data: st.DataObject) -> None:
        """Over any connection that there ever was. What comes over the newest counts, also if that has ended since."""
        connections = self.connections.get(client)
        if not connections:
            self.ledger.report(client, b"of nobody", rows({0: 10**9}))
            return
        connection = data.draw(st.sampled_from(connections))
        if connection == connections[-1]:
            self.reported[client] = dict(self.counted.get(client, {}))
            self.ledger.report(client, connection, rows(self.reported[client], held=1))
        else:
            self.ledger.report(client, connection, rows({0: 10**9}))

    @rule(client=CLIENTS, data=st.data())
    def lose(self, client: str, data: st.DataObject) -> None:
        if self.connections.get(client):
            connection = data.draw(st.sampled_from(self.connections[client]))
            self.open.discard(connection)
            self.ledger.lost(client, connection)

    @rule(client=CLIENTS)
    def leave(self, client: str) -> None:
        """A client that left never comes back; who has its name is another one."""
        connections = self.connections.get(client)
        if connections:  # also when the connection was found to have ended before it was read that the client leaves
            self.ledger.left(client, connections[-1])
            self.open.difference_update(connections)
            del self.connections[client]
            self.counted.pop(client, None)
            self.left.append(self.reported.pop(client, {}))

    @invariant()
    def everybody_counts_once(self) -> None:
        seen = self.ledger.rows()
        here = {client for client, connections in self.connections.items() if connections[-1] in self.open}
        assert seen.keys() == {*here, DEPARTED}
        for client in here:
            assert tokens_of(seen[client]) == {k: v for k, v in self.reported.get(client, {}).items() if v}
        total: dict[int | None, int] = {}
        for counted in (*self.reported.values(), *self.left):
            for engine_id, tokens in counted.items():
                total[engine_id] = total.get(engine_id, 0) + tokens
        shown = tokens_of(client_ledger.sum_by_engine(seen.values()))
        assert shown == total
        assert all(shown.get(engine_id, 0) >= tokens for engine_id, tokens in self.seen.items())
        assert all(row[HELD] == 0 for row in seen[DEPARTED].values())
        self.seen = shown


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_of_clients_that_come_and_go_for_ever_a_sum_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_ledger, "_MAX_LOST", 10)
    ledger: Any = ClientLedger()
    for number in range(100):
        ledger.joined(f"{number}", b"%d" % number)
        ledger.report(f"{number}", b"%d" % number, rows({0: 1}))
        ledger.lost(f"{number}", b"%d" % number)
    assert tokens_of(ledger.rows()[DEPARTED]) == {0: 100}
    assert (len(ledger._lost), len(ledger._accounts)) == (10, 0)
    ledger.joined("99", b"again")
    assert tokens_of(ledger.rows()["99"]) == {0: 1}
    assert tokens_of(ledger.rows()[DEPARTED]) == {0: 99}
