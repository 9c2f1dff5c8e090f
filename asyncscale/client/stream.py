"""A request's life on the client, without I/O: what is sent of it, its choices, who waits for its end."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from asyncscale.client.affinity import prefix_hashes
from asyncscale.client.choice import ChoiceStream, resolve
from asyncscale.client.completion import ChoiceCompletion, Completion, Logprob, Timing
from asyncscale.client.token_ids import wire_bytes
from asyncscale.messages import Add, TokenLogprobs
from asyncscale.params import Sampling, SamplingParams
from asyncscale.tokenization.codec import TextCodec

if TYPE_CHECKING:
    from asyncscale.client.tracing import RequestSpan


class RequestStream:
    """One request: its choices, who waits for them, and how it ended."""

    __slots__ = (
        "__weakref__",
        "_end_waiters",
        "_num_open",
        "_on_end",
        "arrival",
        "arrivals",
        "choices",
        "codec",
        "done",
        "engine_id",
        "error",
        "expected_output_tokens",
        "first_token_at",
        "num_cached_tokens",
        "num_deaths",
        "num_moves",
        "num_preemptions",
        "order",
        "params",
        "pinned_engine",
        "prefill_s",
        "prefix_hashes",
        "priority",
        "prompt_logprobs",
        "prompt_token_ids",
        "queued_at",
        "queued_s",
        "request_id",
        "sampling",
        "scores",
        "sent_at",
        "session",
        "span",
        "timer",
        "weight_versions",
    )

    def __init__(
        self,
        *,
        request_id: str,
        wire_id: int,
        prompt_token_ids: array[int],
        params: SamplingParams,
        sampling: Sampling,
        codec: TextCodec,
        priority: int,
        session: str | None,
        pinned_engine: int | None,
        arrival: float,
        expected_output_tokens: int,
        on_end: Callable[[RequestStream], None],
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.sampling = sampling
        self.codec = codec
        self.priority = priority
        self.session = session
        self.prefix_hashes = prefix_hashes(prompt_token_ids)  # until its engine has computed the prompt
        self.expected_output_tokens = expected_output_tokens
        self.pinned_engine = pinned_engine
        self.arrival = arrival
        self.first_token_at: float | None = None
        self.queued_at: float | None = None  # sent to the engine that computed, or is to compute, its first token
        self.queued_s = 0.0
        self.prefill_s: float | None = None
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_moves = 0  # how often it was sent anew
        self.num_deaths = 0  # of engines that it was aboard
        self.sent_at = 0.0  # to the engine where it is now
        self.engine_id: int | None = None
        self.scores: dict[int, float] = {}  # of every engine, when it was sent
        self.order = wire_id  # of arrival at this client
        self.error: BaseException | None = None
        self.done = False
        self.timer: asyncio.TimerHandle | None = None
        self.span: RequestSpan | None = None  # if it is traced
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.weight_versions: list[int] = []  # of its tokens so far, if any of them is not of version 0
        # With one choice, tokens arrive in its own order; with more, this is the order over all: the choice of each
        # arrival.
        self.arrivals: list[int] | None = [] if params.n > 1 else None
        self.choices = [ChoiceStream(self, index, wire_id + index, self.arrivals) for index in range(params.n)]
        self._on_end = on_end
        self._num_open = params.n
        self._end_waiters: list[asyncio.Future[None]] = []

    @property
    def open_choices(self) -> list[ChoiceStream]:
        """Those that have not ended."""
        return [choice for choice in self.choices if choice.finish_reason is None]

    def messages(self) -> list[Add]:
        """What asks an engine for the rest of this request: all of it, or what another engine left undone.

        The draw of a token depends on seed and position only, so the tokens go on as they would have there.
        """
        if self.num_moves == 0:
            return [self._message(self.choices[0].wire_id, self.prompt_token_ids, self.sampling, len(self.choices))]
        has_prompt_logprobs = self.num_tokens > 0
        if not has_prompt_logprobs:
            self.prompt_logprobs.clear()  # a part of the prompt was computed; it is all computed again
        messages = []
        for choice in self.open_choices:
            sampling = msgspec.structs.replace(
                self.sampling,
                seed=(self.sampling.seed + choice.index) % 2**64,
                prompt_logprobs=None if has_prompt_logprobs or choice.index else self.sampling.prompt_logprobs,
            )
            token_ids = self.prompt_token_ids + array("i", choice.token_ids)
            messages.append(self._message(choice.wire_id, token_ids, sampling, 1))
        return messages

    def _message(self, wire_id: int, token_ids: array[int], sampling: Sampling, n: int) -> Add:
        return Add(
            wire_id,
            wire_bytes(token_ids),
            len(self.prompt_token_ids),
            sampling,
            n,
            self.priority,
            self.weight,
        )

    @property
    def weight(self) -> int:
        """The work in each of its choices, in tokens."""
        return len(self.prompt_token_ids) + self.expected_output_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens so far, over all choices."""
        return len(self.choices[0].token_ids) if self.arrivals is None else len(self.arrivals)

    def note_weight_version(self, version: int) -> None:
        """The next tokens are of this version, which is not 0."""
        if not self.weight_versions and self.num_tokens:
            self.weight_versions.append(0)
        if self.weight_versions[-1:] != [version]:
            self.weight_versions.append(version)

    def choice_finished(self) -> None:
        """One of the choices has all its tokens."""
        self._num_open -= 1
        if self._num_open == 0:
            self._end()

    def fail(self, error: BaseException) -> None:
        """End with an error. The first ending wins."""
        if not self.done:
            self.error = error
            for choice in self.choices:
                if choice.finish_reason is None:
                    choice.finish_reason = "abort"
            self._end()

    def _end(self) -> None:
        self.done = True
        if self.timer is not None:
            self.timer.cancel()
        self._on_end(self)
        for choice in self.choices:
            if choice.waiter is not None:
                resolve(choice.waiter)
        for waiter in self._end_waiters:
            resolve(waiter)
        self._end_waiters.clear()
        if self.span is not None:
            self.span.end(self)

    def wait_token(self) -> asyncio.Future[None]:
        """Like that of a choice, for a token of any of them."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for choice in self.open_choices:
            choice.wait_token().add_done_callback(lambda _: resolve(future))
        return future

    def wait_end(self) -> asyncio.Future[None]:
        """A future that is done when the request has ended; not woken per token."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._end_waiters.append(future)
        return future

    def completion(self) -> Completion:
        """The finished request as a value."""
        return Completion(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids.tolist(),
            choices=tuple(_choice_completion(choice) for choice in self.choices),
            prompt_logprobs=_prompt_logprobs(self),
            timing=self.timing(),
            weight_versions=tuple(self.weight_versions) or ((0,) if self.num_tokens else ()),
        )

    def timing(self) -> Timing:
        """When what happened, so far."""
        return Timing(
            arrival=self.arrival,
            queued=self.queued_at,
            queued_s=self.queued_s,
            prefill_s=self.prefill_s,
            first_token=self.first_token_at,
            last_token=max((c.last_token_at for c in self.choices if c.last_token_at is not None), default=None),
            engine=self.engine_id,
            scores=self.scores,
            num_output_tokens=self.num_tokens,
            longest_output=max(len(choice.token_ids) for choice in self.choices),
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
            num_moves=self.num_moves,
        )


def _choice_completion(choice: ChoiceStream) -> ChoiceCompletion:
    logprobs = None
    if choice.request.params.logprobs is not None:
        logprobs = [_logprob_table(entry) for entry in choice.logprobs[: len(choice.token_ids)]]
    return ChoiceCompletion(
        index=choice.index,
        text=choice.text(),
        token_ids=list(choice.token_ids),
        finish_reason=choice.finish_reason,
        logprobs=logprobs,
    )


def _prompt_logprobs(request: RequestStream) -> list[dict[int, Logprob] | None] | None:
    if request.params.prompt_logprobs is None:
        return None
    return [None, *(_logprob_table(entry) for entry in request.prompt_logprobs)]


def _logprob_table(entry: TokenLogprobs) -> dict[int, Logprob]:
    chosen, *top = entry.token_ids
    table = {chosen: Logprob(entry.logprobs[0], entry.rank)}
    for rank, (token_id, logprob) in enumerate(zip(top, entry.logprobs[1:], strict=True), start=1):
        table.setdefault(token_id, Logprob(logprob, rank))
    return table
