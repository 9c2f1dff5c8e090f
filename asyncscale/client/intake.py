"""What engines say of requests, taken into their streams."""

from __future__ import annotations

import time
from typing import Protocol

from asyncscale import messages
from asyncscale.client.choice import ChoiceStream
from asyncscale.client.live_requests import LiveRequests
from asyncscale.client.router import Router
from asyncscale.client.stream import RequestStream
from asyncscale.errors import EngineError, RequestAbortedError
from asyncscale.metrics.request_counters import RequestCounters

_NEVER = float("nan")


class Ending(Protocol):
    """Ends requests before their engine does."""

    def abort(self, request: RequestStream, error: Exception) -> None:
        """With `error`, here and on its engine."""

    def abort_on_engine(self, request: RequestStream, wire_ids: list[int]) -> None:
        """These of its choices, on its engine alone."""


class Intake:
    """Tokens to their streams, and what is learned by the way to the router. Whatever makes no sense ends the requests
    that it may have been about, and is counted."""

    def __init__(self, live: LiveRequests, router: Router, ending: Ending, counters: RequestCounters) -> None:
        self._live = live
        self._counters = counters
        self._router = router
        self._ending = ending
        self.num_malformed = 0  # messages that were dropped because they made no sense

    def on_nonsense(self, engine_id: int) -> None:
        """A message was dropped: it may have held tokens of any request aboard, which would go on without them."""
        self.num_malformed += 1
        self._counters.malformed()
        for request in self._live.aboard(engine_id):
            error = "a message of its engine made no sense, and may have held some of its tokens"
            self._ending.abort(request, EngineError(f"request {request.request_id!r}: {error}", engine_id=engine_id))

    def on_outputs(self, engine_id: int, vocab_size: int, outputs: messages.Outputs) -> None:
        """Take in what a step made. Who is woken runs when all of the message has been taken in."""
        token_ids = outputs.token_ids
        if token_ids and (max(token_ids) >= vocab_size or min(token_ids) < 0):
            self._end_impossible(engine_id, vocab_size, outputs)
        if outputs.logprobs or outputs.prompt_logprobs:
            self._on_logprobs(outputs)
        for started in outputs.started:
            self._on_started(started)
        for wire_id in outputs.preempted:
            self._on_preempted(engine_id, wire_id)
        if outputs.weight_version:
            self._on_weight_version(outputs)
        now = time.monotonic()
        find = self._live.choices.get
        to_check: list[ChoiceStream] = []
        # Most choices got their token before this one in the same message, and so share that time: one object.
        before, num_alike, num_unwanted = _NEVER, 0, 0
        for wire_id, token_id in zip(outputs.request_ids, token_ids, strict=True):
            choice = find(wire_id)
            if choice is None:
                num_unwanted += 1  # it ended here before its engine knew
                continue
            last = choice.last_token_at
            if last is before:
                num_alike += 1
            elif last is None:
                self._on_first_token(engine_id, choice.request, now)
            elif last is not now:  # else it is one of several tokens that came together
                if num_alike:
                    self._counters[engine_id].inter_token_latency(now - before, num_alike)
                before, num_alike = last, 1
            if choice.push(token_id, now):
                to_check.append(choice)
        self._counters.received(engine_id, len(token_ids) - num_unwanted, now - before, num_alike)
        for finished in outputs.finished:
            self._on_finished(engine_id, finished)
        for choice in to_check:
            if choice.check_stop_strings():
                self._live.discard_choice(choice)
                self._ending.abort_on_engine(choice.request, [choice.wire_id])

    def _end_impossible(self, engine_id: int, vocab_size: int, outputs: messages.Outputs) -> None:
        """End the requests that were sent a token which the model does not have."""
        self.num_malformed += 1
        self._counters.malformed()
        for wire_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
            choice = self._live.choices.get(wire_id)
            if choice is not None and not 0 <= token_id < vocab_size:
                error = f"its engine sent token id {token_id}; the model has ids 0 to {vocab_size - 1}"
                request = choice.request
                error = f"request {request.request_id!r}: {error}"
                self._ending.abort(request, EngineError(error, engine_id=engine_id))

    def _on_started(self, started: messages.Started) -> None:
        choice = self._live.choices.get(started.request_id)
        if choice is not None and choice.request.first_token_at is None:  # else another choice or engine had one before
            request = choice.request
            request.queued_s = started.queued_s
            request.prefill_s = started.prefill_s
            request.num_cached_tokens = started.num_cached_tokens

    def _on_preempted(self, engine_id: int, wire_id: int) -> None:
        choice = self._live.choices.get(wire_id)
        if choice is not None:
            request = choice.request
            request.num_preemptions += 1
            if request.span is not None:
                request.span.preempted(engine_id)

    def _on_weight_version(self, outputs: messages.Outputs) -> None:
        for wire_id in outputs.request_ids:
            choice = self._live.choices.get(wire_id)
            if choice is not None and choice.finish_reason is None:
                choice.request.note_weight_version(outputs.weight_version)

    def _on_first_token(self, engine_id: int, request: RequestStream, now: float) -> None:
        if request.first_token_at is None:
            request.first_token_at = now
            if request.span is not None:
                request.span.first_token()
            self._counters[engine_id].first_token(request, now)
            self._router.computed(engine_id, request.prefix_hashes)
            request.prefix_hashes = ()

    def _on_logprobs(self, outputs: messages.Outputs) -> None:
        for index, logprobs in outputs.logprobs:
            choice = self._live.choices.get(outputs.request_ids[index])
            if choice is not None:
                choice.logprobs.append(logprobs)
        for request_id, prompt_logprobs in outputs.prompt_logprobs:
            choice = self._live.choices.get(request_id)
            if choice is not None and choice.index == 0:
                choice.request.prompt_logprobs.extend(prompt_logprobs)

    def _on_finished(self, engine_id: int, finished: messages.Finished) -> None:
        choice = self._live.choices.get(finished.request_id)
        if choice is None or choice.request.engine_id != engine_id:
            return
        self._live.discard_choice(choice)
        request = choice.request
        self._router.ended(engine_id, 1, request.weight)
        if finished.reason in ("stop", "length"):
            choice.finish(finished.reason, finished.stop_token_id)
        elif finished.reason == "abort":
            error = RequestAbortedError(f"request {request.request_id!r} was aborted by its engine")
            self._ending.abort(request, error)
        else:
            choice.finish_reason = "error"  # its engine has ended it already
            error_text = finished.error or "the engine gave no reason"
            self._ending.abort(request, EngineError(error_text, engine_id=engine_id))
