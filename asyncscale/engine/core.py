"""The engine without its socket: requests in, one step at a time, outputs per client out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import msgspec
import numpy as np

from asyncscale.config import EngineConfig
from asyncscale.engine.admission import choice_ids, find_defect, make_choices
from asyncscale.engine.batch import Batch, StepResult
from asyncscale.engine.drafting import Drafter
from asyncscale.engine.outbox import Outbox
from asyncscale.engine.preemption_watch import PreemptionWatch
from asyncscale.engine.quota import Quota
from asyncscale.engine.request import Request
from asyncscale.engine.runner import Runner
from asyncscale.engine.scheduler import Scheduler
from asyncscale.engine.stop_conditions import StopConditions
from asyncscale.engine.weight_updates import WeightUpdates
from asyncscale.messages import Add, Finished, FinishReason, Load, Outputs, Started, fair_share
from asyncscale.metrics.engine_counters import EngineCounters
from asyncscale.metrics.request_counters import client_id

_log = logging.getLogger(__name__)


class EngineCore:
    """Batches the requests of any number of clients through one runner. Does no I/O; used from one thread.

    ::

        core = EngineCore(runner, config)
        core.add(client, messages.Add(...))
        while core.has_work:
            for client, outputs in core.step().items():
                ...

    A request that is wrong ends with a Finished(reason="error") in its client's next outputs. What `runner.execute`
    raises passes through `step`: the engine is then broken.

    methods: what clients may call by name; those that begin with an underscore are for the owner's own use.
    load_version: changes whenever running, waiting or `by_client` change. clock: seconds, monotonic. counters: where to
    count what it does. weight_version: of the runner's weights.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        counters: EngineCounters | None = None,
        weight_version: int = 0,
    ) -> None:
        self._runner = runner
        self._clock = clock
        self._counters = counters or EngineCounters()
        if not runner.supports_prefix_caching:
            config = msgspec.structs.replace(config, enable_prefix_caching=False)
        self._max_num_seqs = config.max_num_seqs
        self._outbox = Outbox(config.max_num_seqs, weight_version)
        self._scheduler = Scheduler(config, num_blocks=runner.num_blocks, max_model_len=runner.max_model_len)
        self._stops = StopConditions(self._scheduler.table, runner.vocab_size)
        self._scheduler.listeners = (runner, self._stops, self._outbox)
        self._drafter = Drafter(self._scheduler.table, config, runner.token_cost)
        if config.speculation != "off" and runner.token_cost < math.inf:
            self._scheduler.listeners += (self._drafter,)
            self._scheduler.drafter = self._drafter
        elif config.speculation == "ngram":
            _log.warning("speculation='ngram' does nothing here: this way of computing the model cannot check guesses")
        self._clients: dict[bytes, dict[int, Request]] = {}  # requests alive, by client and id
        self._num_alive = 0
        self._quota = Quota()
        self._weights: dict[bytes, int] = {}  # of requests alive, by client
        self._num_arrived = 0
        self._preemptions = PreemptionWatch()
        self._paused = False
        self._held = False
        self._accepting = True
        self.load_version = 0
        self.methods: dict[str, Callable[..., object]] = {
            "reset_prefix_cache": self._scheduler.pool.reset_cache,
            "kv_cache_stats": self.kv_cache_stats,
            "speculation_stats": self.speculation_stats,
            "pause": self.pause,
            "drain": self.drain,
            "resume": self.resume,
            "_hold_steps": self.hold_steps,
            "_release_steps": self.release_steps,
            **WeightUpdates(runner, self).methods,
        }

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or to hand out."""
        return (bool(self._clients) and not self._rests) or len(self._outbox) > 0

    @property
    def has_outputs(self) -> bool:
        """Whether there is anything to hand out without a step."""
        return len(self._outbox) > 0

    @property
    def clients(self) -> Collection[bytes]:
        """Who has requests here."""
        return self._clients.keys()

    @property
    def accepting(self) -> bool:
        """Whether new requests should come here."""
        return self._accepting

    def add(self, client: bytes, message: Add) -> None:
        """Take a request in. What is wrong with it is said in the client's next outputs."""
        defect = find_defect(message, self._runner.vocab_size, self._runner.max_model_len)
        defect = defect or self._find_conflict(client, message)
        if defect is not None:
            self._refuse(client, message, "error", defect)
        elif len(message.token_ids) // 4 - message.num_prompt_tokens >= message.sampling.max_tokens:
            self._refuse(client, message, "length")  # was complete where it comes from
        else:
            choices = make_choices(message, client, arrival=self._clock(), first_order=self._num_arrived)
            self._num_arrived += len(choices)
            self._num_alive += len(choices)
            for request in choices:
                self._quota.take(request)
            self._clients.setdefault(client, {}).update((request.request_id, request) for request in choices)
            self._weights[client] = self._weights.get(client, 0) + message.weight * len(choices)
            self._queue_with_siblings(choices)
            self._load_changed()

    def abort(self, client: bytes, request_ids: Iterable[int]) -> None:
        """Forget these requests and say nothing of it: the client knows. Unknown ids are ignored."""
        for request_id in reversed(list(request_ids)):  # a first choice after its siblings: no need to promote them
            request = self._clients.get(client, {}).get(request_id)
            if request is not None:
                self._forget(request)

    def drop_client(self, client: bytes) -> None:
        """The client is gone: abort all that it sent."""
        request_ids = self._clients.get(client, ())
        if request_ids:
            _log.debug("client %s is gone: %d of its requests are aborted", client_id(client), len(request_ids))
        self.abort(client, request_ids)
        self._outbox.discard(client)

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> dict[bytes, Outputs]:
        """Compute one batch. Returns one Outputs for each client that got tokens or endings.

        meanwhile: is called while the batch is computed, if there is one, or just before.
        """
        if not self._rests:
            self._compute(meanwhile)
        return self.flush()

    def flush(self) -> dict[bytes, Outputs]:
        """As `step`, but computes nothing: what there is to say of requests, such as that one was refused."""
        return self._outbox.flush(self.load)

    @property
    def _rests(self) -> bool:
        return self._paused or self._held

    def _compute(self, meanwhile: Callable[[], None]) -> None:
        num_running = self._scheduler.num_running
        schedule = self._scheduler.schedule(self._clock())
        if self._scheduler.num_running != num_running:
            self._load_changed()
        if schedule.preempted:
            self._preemptions.add(len(schedule.preempted), self._clock())
            self._counters.preempted(len(schedule.preempted))
            for request in schedule.preempted:
                self._outbox.put_preempted(request)
        for request, error in schedule.failed:
            self._finish(request, "error", error=error)
        if schedule.batch is not None:
            self._apply(schedule.batch, self._runner.execute(schedule.batch, meanwhile))
        self._counters.scheduled(self._scheduler, self._drafter)

    def _load_changed(self) -> None:
        self.load_version += 1
        running = self._scheduler.num_running
        self._counters.load(running, self._num_alive - running, self._scheduler.pool)

    def load(self, client: bytes) -> Load:
        """The counts of this moment; waiting counts all that are alive and hold no row."""
        running, pool = self._scheduler.num_running, self._scheduler.pool
        waiting = self._num_alive - running
        return Load(
            version=self.load_version,
            running=running,
            waiting=waiting,
            mine=len(self._clients.get(client, ())),
            tokens=sum(self._weights.values()),
            my_tokens=self._weights.get(client, 0),
            used_blocks=pool.num_blocks - pool.num_free,
            num_blocks=pool.num_blocks,
            accepting=self._accepting,
            share=fair_share(self._max_num_seqs, client, self._clients),
        )

    def by_client(self) -> dict[bytes, tuple[int, int]]:
        """How many requests each client has here, and their weight; clients without any are left out."""
        return {client: (len(requests), self._weights[client]) for client, requests in self._clients.items()}

    def pause(self) -> None:
        """Compute nothing, and ask for no more requests, until `resume`. Those that are here stay as they are."""
        self._paused = True
        self._set_accepting(False)
        _log.info("paused, with %d requests", self._num_alive)

    def drain(self) -> None:
        """Go on with what is here, and ask for no more, until `resume`. What is sent all the same is served."""
        self._set_accepting(False)
        _log.debug("drains, with %d requests", self._num_alive)  # as at the end of every owner

    def resume(self) -> None:
        """End a pause or a drain."""
        self._paused = False
        self._set_accepting(True)
        _log.info("resumed, with %d requests", self._num_alive)

    def hold_steps(self) -> None:
        """Compute nothing until `release_steps`: for moments, so that other engines' requests need not come here."""
        self._held = True

    def release_steps(self) -> None:
        """End that; a pause goes on."""
        self._held = False

    def _set_accepting(self, accepting: bool) -> None:
        if accepting != self._accepting:
            self._accepting = accepting
            self._load_changed()

    def weights_changed(self, version: int, *, recompute: bool) -> None:
        """The runner has other weights from now on: no keys and values of those before are shared any more.

        recompute: those of the requests that run are computed anew, too.
        """
        self._outbox.weight_version = version
        self._scheduler.weights_changed(recompute=recompute)
        self._load_changed()
        _log.info("weights of version %d, with %d requests", version, self._num_alive)

    def kv_cache_stats(self) -> dict[str, int]:
        """Blocks by state, and the prefix cache's use in tokens (looked up and found at first admission)."""
        pool = self._scheduler.pool
        return {
            "num_blocks": pool.num_blocks,
            "free_blocks": pool.num_free,
            "used_blocks": pool.num_blocks - pool.num_free,
            "cached_blocks": pool.num_cached,
            "prefix_queries": self._scheduler.prefix_queries,
            "prefix_hits": self._scheduler.prefix_hits,
        }

    def speculation_stats(self) -> dict[str, int]:
        """Tokens that were guessed, and of them those that were right, since the start."""
        return {"drafted_tokens": self._drafter.num_drafted, "accepted_tokens": self._drafter.num_accepted}

    def check_integrity(self) -> None:
        """Audit rows and blocks; raises RuntimeError. For tests."""
        self._scheduler.check_integrity()

    # --- a step's result

    def _apply(self, batch: Batch, result: StepResult) -> None:
        scheduler = self._scheduler
        failed = [(scheduler.request_at(row), error) for row, error in result.errors.items()]
        if failed:
            batch, result = _without_errors(batch, result)
        for row, entries in result.prompt_logprobs.items():
            self._outbox.put_prompt_logprobs(scheduler.request_at(row), entries)
        for request in scheduler.advance(batch, result):
            self._on_prompt_computed(request)
        self._counters.step(_num_tokens(batch), len(result.rows))
        self._outbox.put_tokens(result)
        for stop in self._stops.find(*result.newest(batch)):  # no guess ends a row, so nothing before can
            self._finish(scheduler.request_at(stop.row), stop.reason, stop_token_id=stop.stop_token_id)
        for request, error in failed:
            self._finish(request, "error", error=error)

    def _on_prompt_computed(self, request: Request) -> None:
        if request.first_token_at is None:
            request.first_token_at = now = self._clock()
            scheduled_at = now if request.scheduled_at is None else request.scheduled_at
            self._outbox.put_started(
                request.client,
                Started(
                    request.request_id,
                    queued_s=scheduled_at - request.arrival,
                    prefill_s=now - scheduled_at,
                    num_cached_tokens=request.num_cached_tokens,
                ),
            )
            self._counters.prompt_computed(request)
        siblings, request.siblings = request.siblings, []
        for sibling in filter(self._is_alive, siblings):
            sibling.block_digests = request.block_digests.copy()
            self._scheduler.add(sibling)

    # --- arrivals and departures

    def _find_conflict(self, client: bytes, message: Add) -> str | None:
        alive = self._clients.get(client, {})
        for request_id in choice_ids(message):
            if request_id in alive:
                return f"request id {request_id} is already in use"
        excess = self._quota.find_excess(client, message)
        if excess is not None:
            return excess
        num_tokens, scheduler = len(message.token_ids) // 4, self._scheduler
        return None if scheduler.can_ever_fit(num_tokens) else scheduler.no_room_message(num_tokens)

    def _refuse(self, client: bytes, message: Add, reason: FinishReason, error: str | None = None) -> None:
        for request_id in choice_ids(message):
            self._outbox.put_finished(client, Finished(request_id, reason, error=error))

    def _is_alive(self, request: Request) -> bool:
        return self._clients.get(request.client, {}).get(request.request_id) is request

    def _queue_with_siblings(self, choices: list[Request]) -> None:
        """Queue the first; the others follow when its prompt is computed, to find that in the prefix cache."""
        first = choices[0]
        first.siblings = choices[1:]
        self._scheduler.add(first)

    def _finish(
        self, request: Request, reason: FinishReason, *, stop_token_id: int | None = None, error: str | None = None
    ) -> None:
        self._outbox.put_finished(request.client, Finished(request.request_id, reason, stop_token_id, error))
        self._forget(request)

    def _forget(self, request: Request) -> None:
        self._scheduler.remove(request)
        alive = self._clients[request.client]
        del alive[request.request_id]
        self._num_alive -= 1
        self._quota.give_back(request)
        self._weights[request.client] -= request.weight
        if not alive:
            del self._clients[request.client]
            del self._weights[request.client]
            self._outbox.forget(request.client)
        self._load_changed()
        if not self._num_alive and not self._accepting:
            _log.debug("drained: no requests are left")
        siblings = list(filter(self._is_alive, request.siblings))
        if siblings:
            self._queue_with_siblings(siblings)


def _num_tokens(batch: Batch) -> int:
    """How many it computes."""
    if batch.num_drafts is None and batch.num_decodes == batch.rows.size:
        return batch.num_decodes
    return int(batch.num_new_tokens.sum())


def _without_errors(batch: Batch, result: StepResult) -> tuple[Batch, StepResult]:
    """Batch and result without the rows that failed: their tokens and their blocks' content are not to be used."""
    errors = list(result.errors)
    computed = np.isin(batch.rows, errors, invert=True)
    sampled = np.isin(result.rows, errors, invert=True)
    num_decodes = int(np.count_nonzero(computed[: batch.num_decodes]))
    return (
        replace(
            batch,
            rows=batch.rows[computed],
            num_new_tokens=batch.num_new_tokens[computed],
            num_decodes=num_decodes,
            num_drafts=None if batch.num_drafts is None else batch.num_drafts[computed],
        ),
        replace(
            result,
            rows=result.rows[sampled],
            token_ids=result.token_ids[sampled],
            prompt_logprobs={
                row: entries for row, entries in result.prompt_logprobs.items() if row not in result.errors
            },
        ),
    )
