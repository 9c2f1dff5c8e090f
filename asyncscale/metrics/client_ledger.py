"""What all clients that are attached to an owner have counted, and those that were."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from asyncscale.metrics.catalog import REQUEST_LAYOUT as LAYOUT
from asyncscale.metrics.snapshot import DEPARTED, RequestRows

# A client whose connection was lost may be back. Of so many that have not, it is remembered what is theirs.
_MAX_LOST = 1000


@dataclass(slots=True)
class _Account:
    """connection: over which the client reports. rows: its newest report."""

    connection: bytes
    rows: RequestRows = field(default_factory=dict)


class ClientLedger:
    """::

        ledger.joined(client_id, connection)
        ledger.report(client_id, connection, rows)      # of all that the client has counted: the newest report counts
        ledger.lost(client_id, connection)              # it may come back, and then goes on counting from there
        ledger.left(client_id, connection)              # it does not
        ledger.rows()                                   # {client id: rows}, and {"departed": their sum}

    What is said of a connection that is not the client's newest is late, and ignored. A report may come after the news
    that its connection has ended: it was sent before. What was counted stays in the sum, whatever comes in whatever
    order. May be read by any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # or a reader might see a client's counts twice, or not at all, as it leaves
        self._accounts: dict[str, _Account] = {}
        self._lost: dict[str, _Account] = {}  # longest gone first
        self._left: RequestRows = {}
        self._departed: RequestRows | None = {}  # lost and left together; None: to be summed anew

    def joined(self, client_id: str, connection: bytes) -> None:
        """The client is there, for the first time or again."""
        with self._lock:
            known = self._accounts.get(client_id) or self._lost.pop(client_id, None)
            self._accounts[client_id] = _Account(connection, known.rows if known else {})
            self._departed = None

    def report(self, client_id: str, connection: bytes, rows: RequestRows) -> None:
        """All that the client has counted since its start."""
        with self._lock:
            account = self._find(client_id, connection)
            if account is not None:
                account.rows = rows
                self._departed = None

    def lost(self, client_id: str, connection: bytes) -> None:
        """The connection has ended, perhaps the client too."""
        with self._lock:
            if self._find(client_id, connection) is not None and client_id in self._accounts:
                self._lost[client_id] = self._accounts.pop(client_id)
                self._departed = None
            if len(self._lost) > _MAX_LOST:
                self._settle(self._lost.pop(next(iter(self._lost))))

    def left(self, client_id: str, connection: bytes) -> None:
        """The client said so; what it reported last is all that it counted."""
        with self._lock:
            account = self._find(client_id, connection)
            if account is not None:
                self._accounts.pop(client_id, None)
                self._lost.pop(client_id, None)
                self._settle(account)

    def _find(self, client_id: str, connection: bytes) -> _Account | None:
        account = self._accounts.get(client_id) or self._lost.get(client_id)
        return None if account is None or account.connection != connection else account

    def _settle(self, account: _Account) -> None:
        self._left = sum_by_engine([self._left, _without_gauges(account.rows)])
        self._departed = None

    def rows(self) -> dict[str, RequestRows]:
        """Of each client that is there, and of all others together."""
        with self._lock:
            if self._departed is None:
                lost = [_without_gauges(account.rows) for account in self._lost.values()]
                self._departed = sum_by_engine([self._left, *lost])
            rows = {client_id: account.rows for client_id, account in self._accounts.items()}
            rows[DEPARTED] = self._departed
            return rows


def sum_by_engine(clients: Iterable[RequestRows]) -> RequestRows:
    """What these clients have counted together."""
    rows_of: dict[int | None, list[list[int]]] = {}
    for by_engine in clients:
        for engine_id, row in by_engine.items():
            rows_of.setdefault(engine_id, []).append(row)
    return {engine_id: rows[0] if len(rows) == 1 else LAYOUT.sum(rows) for engine_id, rows in rows_of.items()}


def _without_gauges(rows: RequestRows) -> RequestRows:
    return {engine_id: LAYOUT.without_gauges(row) for engine_id, row in rows.items()}
