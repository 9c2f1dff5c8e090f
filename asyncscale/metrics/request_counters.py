"""What one client counts of its requests. No I/O, no clock of its own."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable
from typing import TYPE_CHECKING

from asyncscale.errors import ClientClosedError, RequestAbortedError, RequestTimeoutError
from asyncscale.messages import CLIENT_ID_SIZE
from asyncscale.metrics.catalog import OUTCOMES
from asyncscale.metrics.catalog import REQUEST_LAYOUT as LAYOUT

if TYPE_CHECKING:
    from asyncscale.client.stream import RequestStream

_SUCCESS = {outcome: LAYOUT.at("request_success", outcome) for outcome in OUTCOMES}
_RECEIVED, _MOVES, _HELD = map(LAYOUT.at, ("tokens_received", "request_moves", "num_requests_held"))
_QUERIES, _HITS = map(LAYOUT.at, ("request_prefix_cache_queries", "request_prefix_cache_hits"))
_REJECTIONS, _MALFORMED = map(LAYOUT.at, ("admission_rejections", "client_malformed_messages"))


class EngineRow:
    """Of the requests that one engine had last. inter_token_latency: takes (seconds, how many sequences)."""

    def __init__(self) -> None:
        self.cells = cells = LAYOUT.zeros()
        self._first_token_time = LAYOUT.observer(cells, "time_to_first_token_seconds")
        self.inter_token_latency = LAYOUT.observer(cells, "inter_token_latency_seconds")
        self._time_per_output_token = LAYOUT.observer(cells, "request_time_per_output_token_seconds")
        self._latency = LAYOUT.observer(cells, "e2e_request_latency_seconds")
        self._queue_time = LAYOUT.observer(cells, "request_queue_time_seconds")
        self._prefill_time = LAYOUT.observer(cells, "request_prefill_time_seconds")
        self._decode_time = LAYOUT.observer(cells, "request_decode_time_seconds")
        self._inference_time = LAYOUT.observer(cells, "request_inference_time_seconds")
        self.held = LAYOUT.observer(cells, "request_held_time_seconds")
        self._prompt_tokens = LAYOUT.observer(cells, "request_prompt_tokens")
        self._generation_tokens = LAYOUT.observer(cells, "request_generation_tokens")
        self._n = LAYOUT.observer(cells, "request_params_n")
        self._max_tokens = LAYOUT.observer(cells, "request_params_max_tokens")

    def first_token(self, request: RequestStream, now: float) -> None:
        """A request's first token has come, and with it what its engine says of how it started."""
        self._first_token_time(now - request.arrival)
        self._queue_time(request.queued_s)
        self._prefill_time(request.prefill_s or 0.0)
        self.cells[_QUERIES] += len(request.prompt_token_ids)
        self.cells[_HITS] += request.num_cached_tokens

    def moved(self) -> None:
        """A request was taken from this engine, which had not finished it."""
        self.cells[_MOVES] += 1

    def ended(self, request: RequestStream, now: float) -> None:
        """A request has all its tokens, or failed."""
        outcome = _outcome(request)
        self.cells[_SUCCESS[outcome]] += 1
        self._prompt_tokens(len(request.prompt_token_ids))
        self._generation_tokens(request.num_tokens)
        self._n(len(request.choices))
        self._max_tokens(request.sampling.max_tokens)
        if outcome in ("stop", "length"):
            self._latency(now - request.arrival)
        first_token_at = request.first_token_at
        if first_token_at is None:
            return
        longest = max(request.choices, key=lambda choice: len(choice.token_ids))
        duration = (longest.last_token_at or first_token_at) - first_token_at
        self._decode_time(duration)
        self._inference_time((request.prefill_s or 0.0) + duration)
        if len(longest.token_ids) > 1:
            self._time_per_output_token(duration / (len(longest.token_ids) - 1))


class RequestCounters:
    """::

        counters[engine_id].first_token(request, now)
        counters.ended(request, now)
        counters.rows()                 # {engine id: numbers as in REQUEST_LAYOUT}; from any thread

    The row of None has requests that no engine had, and what has nothing to do with engines.
    client_id: what this client is called. on_change: called whenever something was counted. num_held: how many requests
    wait here now.
    """

    def __init__(self, identity: bytes) -> None:
        self.client_id = client_id(identity)
        self.on_change: Callable[[], None] = lambda: None
        self.num_held: Callable[[], int] = lambda: 0
        self._rows: dict[int | None, EngineRow] = {None: EngineRow()}

    def __getitem__(self, engine_id: int | None) -> EngineRow:
        row = self._rows.get(engine_id)
        if row is None:
            row = self._rows[engine_id] = EngineRow()
        return row

    def received(self, engine_id: int, num_tokens: int, gap: float, num_alike: int) -> None:
        """A message has come with so many tokens that requests wanted: most of them, `num_alike`, to sequences that
        had got their token before it `gap` seconds ago. (In one call, as this is done for every message.)"""
        row = self._rows.get(engine_id) or self[engine_id]
        row.cells[_RECEIVED] += num_tokens
        if num_alike:
            row.inter_token_latency(gap, num_alike)
        self.on_change()

    def ended(self, request: RequestStream, now: float) -> None:
        """A request has all its tokens, or failed."""
        self[request.engine_id].ended(request, now)
        self.on_change()

    def rejected(self) -> None:
        """A request was refused with OverloadedError."""
        self._rows[None].cells[_REJECTIONS] += 1
        self.on_change()

    def malformed(self) -> None:
        """A message made no sense."""
        self._rows[None].cells[_MALFORMED] += 1
        self.on_change()

    def rows(self) -> dict[int | None, list[int]]:
        """What was counted until now."""
        self._rows[None].cells[_HELD] = self.num_held()
        return {engine_id: list(row.cells) for engine_id, row in list(self._rows.items())}


def client_id(identity: bytes) -> str:
    """What the client with this identity, or connection, is called in metrics: short, and unlike all others."""
    return identity[1:CLIENT_ID_SIZE].hex()[:12]


def _outcome(request: RequestStream) -> str:
    match request.error:
        case None:
            return request.choices[0].finish_reason or "error"
        case RequestTimeoutError():
            return "timeout"
        case RequestAbortedError() | ClientClosedError() | CancelledError():
            return "abort"
        case _:
            return "error"
