"""An attached client's side of metrics: it reports what it counts, and asks its owner what all have counted."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping

from asyncscale import messages
from asyncscale.client.metrics_hub import ROUND_TIMEOUT_S
from asyncscale.metrics.catalog import ENGINE_LAYOUT
from asyncscale.metrics.request_counters import RequestCounters
from asyncscale.metrics.snapshot import Counts, EngineRows, RequestRows

# A client that counts something reports it so often. One that is idle says nothing.
_REPORT_INTERVAL_S = 0.5
# Once somebody has looked, what all have counted is fetched so often, for good: of several processes that are scraped
# in turn, none may say less than another did before.
_QUERY_INTERVAL_S = 1.0
# An owner that is there answers within that, unless its event loop is blocked by user code.
_ANSWER_TIMEOUT_S = ROUND_TIMEOUT_S + 0.5


class MetricsLink:
    """::

        link.counts()               # at once, from any thread: the owner's newest answer, and what this client counts
        await link.fresh()          # after a round over all clients

    own: what this client counts. engines: those that it knows, and whether they are up. send: to the coordinator.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        own: RequestCounters,
        engines: Callable[[], Mapping[int, bool]],
        send: Callable[[messages.ToCoordinator], None],
    ) -> None:
        self._loop = loop
        self._own = own
        self._engines = engines
        self._send = send
        self._newest = Counts({}, {})
        self._query_ids = itertools.count()
        self._queries: dict[int, asyncio.Future[None]] = {}
        self._reported: dict[int | None, list[int]] | None = None
        self._reporting: asyncio.TimerHandle | None = None
        self._querying: asyncio.TimerHandle | None = None
        self._is_asked = False  # and has not answered
        self._is_watched = False
        self._is_open = True
        own.on_change = self._report_soon

    # --- what this client has counted

    def on_welcome(self) -> None:
        """The coordinator may know nothing of this client, and nothing of what it asked."""
        self._is_asked = False
        self._reported = None
        self._report_soon()

    def on_round(self, round_id: int) -> None:
        """Somebody wants to know how it is now."""
        self.report(round_id)

    def report(self, round_id: int | None = None) -> None:
        """Say what was counted until now."""
        self._reported = self._own.rows()
        self._send(messages.MetricsReport(self._reported, round_id))

    def _report_soon(self) -> None:
        if self._reporting is None and self._is_open:
            self._reporting = self._loop.call_later(_REPORT_INTERVAL_S, self._report_changes)

    def _report_changes(self) -> None:
        self._reporting = None
        if self._own.rows() != self._reported:
            self.report()
            self._report_soon()  # gauges may change when nothing is counted

    # --- what all have counted

    def counts(self) -> Counts:
        """The newest that is known here."""
        if not self._is_watched and self._is_open:
            self._is_watched = True
            self._loop.call_soon_threadsafe(self._query)
        return self._with_own(self._newest)

    async def fresh(self) -> Counts:
        """What is so now; what was so before, if the owner does not answer."""
        if not self._is_open:
            return self.counts()
        query_id, answer = next(self._query_ids), self._loop.create_future()
        self._queries[query_id] = answer
        self._send(messages.MetricsQuery(query_id, fresh=True))
        try:
            await asyncio.wait([answer], timeout=_ANSWER_TIMEOUT_S)
        finally:
            del self._queries[query_id]
        return self._with_own(self._newest)

    def on_answer(self, answer: messages.MetricsAnswer) -> None:
        """The owner has answered."""
        self._is_asked = False
        self._newest = Counts(dict(sorted(answer.engines.items())), answer.clients)
        query = self._queries.get(answer.query_id)
        if query is not None and not query.done():
            query.set_result(None)

    def _with_own(self, counts: Counts) -> Counts:
        """And with the engines of which the owner has said nothing yet."""
        own: dict[str, RequestRows] = {self._own.client_id: self._own.rows()}
        engines: EngineRows = {key: _row_without_counts(is_up) for key, is_up in self._engines().items()}
        return Counts(engines | counts.engines, counts.clients | own)

    def _query(self) -> None:
        if not self._is_open:
            return
        if not self._is_asked:
            self._is_asked = True
            self._send(messages.MetricsQuery(next(self._query_ids), fresh=False))
        self._querying = self._loop.call_later(_QUERY_INTERVAL_S, self._query)

    # --- the end

    def on_owner_left(self) -> None:
        """Nobody answers any more, and no engine is up."""
        engines, clients = self._newest
        self._newest = Counts({key: ENGINE_LAYOUT.without_gauges(row) for key, row in engines.items()}, clients)
        self.close()

    def close(self) -> None:
        """Neither report nor ask any more."""
        self._is_open = False
        for timer in (self._reporting, self._querying):
            if timer is not None:
                timer.cancel()
        for query in self._queries.values():
            if not query.done():
                query.set_result(None)


def _row_without_counts(is_up: bool) -> list[int]:
    row = ENGINE_LAYOUT.zeros()
    row[ENGINE_LAYOUT.at("engine_up")] = int(is_up)
    return row
