"""The owner's books: what all engines and all clients have counted, and rounds in which clients say it anew."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from asyncscale import messages
from asyncscale.metrics.client_ledger import ClientLedger
from asyncscale.metrics.engine_ledger import EngineLedger
from asyncscale.metrics.request_counters import RequestCounters, client_id
from asyncscale.metrics.snapshot import Counts, RequestRows

# Who does not answer within so many seconds counts with what it said last.
ROUND_TIMEOUT_S = 0.5


class MetricsHub:
    """::

        hub.counts()                # at once, from any thread
        await hub.run_round()       # returns when every client that can has reported

    engines, clients: their books. own: what the owner itself counts as a client.
    ask: sends a MetricsRound to every attached client; returns the connections that it was sent over.
    """

    def __init__(self, own: RequestCounters) -> None:
        self.engines = EngineLedger()
        self.clients = ClientLedger()
        self.ask: Callable[[messages.MetricsRound], set[bytes]] = lambda message: set()
        self._own = own
        self._round_ids = itertools.count()
        self._open: dict[int, tuple[set[bytes], asyncio.Future[None]]] = {}  # rounds: who has not answered
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    def counts(self) -> Counts:
        """The newest that is known."""
        clients: dict[str, RequestRows] = {self._own.client_id: self._own.rows()}
        return Counts(self.engines.read(), clients | self.clients.rows())

    # --- clients that come, report and go

    def on_attach(self, connection: bytes) -> None:
        """A client is there."""
        self.clients.joined(client_id(connection), connection)

    def on_report(self, connection: bytes, report: messages.MetricsReport) -> None:
        """It says what it has counted."""
        known = self.engines.engine_ids
        rows = {engine_id: row for engine_id, row in report.rows.items() if engine_id is None or engine_id in known}
        self.clients.report(client_id(connection), connection, rows)
        if report.round_id in self._open:
            self._answered(report.round_id, connection)

    def on_leave(self, connection: bytes, *, for_good: bool) -> None:
        """It said that it leaves (for_good), or is gone."""
        leave = self.clients.left if for_good else self.clients.lost
        leave(client_id(connection), connection)
        for round_id in list(self._open):
            self._answered(round_id, connection)

    # --- rounds

    async def run_round(self) -> None:
        """Return when every attached client has said what it counted until now, or `ROUND_TIMEOUT_S` later.

        Whoever asks while a round is under way shares the next one.
        """
        if self._next is None:
            self._next = asyncio.ensure_future(self._round_after(self._running))
        await asyncio.shield(self._next)

    async def _round_after(self, running: asyncio.Task[None] | None) -> None:
        if running is not None:
            await asyncio.wait([running])
        self._running, self._next = self._next, None
        round_id = next(self._round_ids)
        missing, done = self.ask(messages.MetricsRound(round_id)), asyncio.get_running_loop().create_future()
        if not missing:
            return
        self._open[round_id] = missing, done
        try:
            await asyncio.wait([done], timeout=ROUND_TIMEOUT_S)
        finally:
            del self._open[round_id]

    def _answered(self, round_id: int, connection: bytes) -> None:
        missing, done = self._open[round_id]
        missing.discard(connection)
        if not missing and not done.done():
            done.set_result(None)

    def close(self) -> None:
        """End the rounds that are under way: nobody answers any more."""
        for missing, done in self._open.values():
            missing.clear()
            if not done.done():
                done.set_result(None)
