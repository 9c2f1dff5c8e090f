"""What is counted, as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from asyncscale.metrics.catalog import ENGINE_LAYOUT, REQUEST_LAYOUT, EngineMetrics, RequestMetrics

# Engine id -> its counts, as in ENGINE_LAYOUT.
EngineRows = dict[int, list[int]]
# Engine id (None: of requests that no engine has had) -> what a client counted of its requests there, as in
# REQUEST_LAYOUT.
RequestRows = dict[int | None, list[int]]

# All clients that have left, or died: they count together.
DEPARTED = "departed"


class Counts(NamedTuple):
    """Everything, in rows of numbers. clients: by their ids."""

    engines: EngineRows
    clients: dict[str, RequestRows]


@dataclass(frozen=True)
class Metrics:
    """Everything that was counted until one moment, the same whichever client is asked::

        metrics = client.metrics()              # at once: the newest that this client knows
        metrics = await client.metrics()        # of this moment, after a round over all clients
        metrics.engines[0].generation_tokens                    # by engine id
        metrics.clients[metrics.client_id].request_success      # by client; those that are gone are "departed"
        metrics.requests.time_to_first_token_seconds.quantile(0.99)
        metrics.requests_of(engine=0).inter_token_latency_seconds.mean

    Counts only ever grow, also when engines and clients die and return.
    model_name: of the model that the engines run. client_id: of the client that was asked. counts: the same, raw.
    """

    model_name: str
    client_id: str = field(compare=False)
    counts: Counts = field(repr=False)
    _refresh: Callable[[], Coroutine[Any, Any, Metrics]] = field(repr=False, compare=False)

    def __await__(self) -> Generator[Any, Any, Metrics]:
        return self._refresh().__await__()

    @cached_property
    def engines(self) -> Mapping[int, EngineMetrics]:
        """What each engine has counted, in order; also those that died."""
        return {engine_id: ENGINE_LAYOUT.read(row) for engine_id, row in self.counts.engines.items()}

    @cached_property
    def all_engines(self) -> EngineMetrics:
        """What they have counted together. engine_up is how many are; kv_cache_usage_perc is their mean."""
        total = ENGINE_LAYOUT.read(ENGINE_LAYOUT.sum(self.counts.engines.values()))
        return dataclasses.replace(total, kv_cache_usage_perc=total.kv_cache_usage_perc / max(1, total.engine_up))

    @cached_property
    def clients(self) -> Mapping[str, RequestMetrics]:
        """What each client that is there has counted, and "departed" for all others together."""
        return {client_id: self.requests_of(client=client_id) for client_id in self.counts.clients}

    @cached_property
    def requests(self) -> RequestMetrics:
        """What all clients, here and departed, have counted together."""
        return self.requests_of()

    def requests_of(self, *, client: str | None = None, engine: int | None = None) -> RequestMetrics:
        """What was counted of the requests of one client, or that one engine had last, or both.

        Raises KeyError for a client that is not among `clients`.
        """
        clients = self.counts.clients.values() if client is None else [self.counts.clients[client]]
        rows = [row for by_engine in clients for key, row in by_engine.items() if engine is None or key == engine]
        return REQUEST_LAYOUT.read(REQUEST_LAYOUT.sum(rows))
