"""A request's life on the client, without I/O: tokens in, waiters woken, text made when somebody reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from asyncscale.client.affinity import prefix_hashes
from asyncscale.client.completion import ChoiceCompletion, Completion, Logprob, Timing
from asyncscale.messages import Add, FinishReason, TokenLogprobs
from asyncscale.params import Sampling, SamplingParams
from asyncscale.tokenization.codec import Detokenizer, TextCodec
from asyncscale.tokenization.stop import StopStrings


class ChoiceStream:
    """The tokens of one choice (of n) of a request, known to its engine as `wire_id`.

    Text is decoded when it is read, token by token in order; only stop strings need it as tokens arrive.
    With ten thousand streams each object that a token touches is a cache miss: so a token needs nothing but this one.
    """

    __slots__ = (
        "_arrivals",
        "_detokenizer",
        "_pieces",
        "_stop",
        "finish_reason",
        "index",
        "last_token_at",
        "logprobs",
        "request",
        "stop_token_id",
        "token_ids",
        "waiter",
        "wire_id",
    )

    def __init__(self, request: RequestStream, index: int, wire_id: int, arrivals: list[int] | None) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.wire_id = wire_id
        self.token_ids: list[int] = []
        self.last_token_at: float | None = None
        self.waiter: asyncio.Future[None] | None = None  # of who waits for the next token
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None
        self._arrivals = arrivals
        self._pieces: list[str] = []
        self._detokenizer: Detokenizer | None = None
        stop = params.stop_strings
        self._stop = StopStrings(stop, params.include_stop_str_in_output) if stop else None

    def push(self, token_id: int, now: float) -> bool:
        """Take the next token, which came at `now`, and wake who waits for it. Whether to look for stop strings next.

        One that crossed an abort or a stop string is dropped.
        """
        if self.finish_reason is not None:
            return False
        self.token_ids.append(token_id)
        self.last_token_at = now
        if self._arrivals is not None:
            self._arrivals.append(self.index)
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            if not waiter.done():
                waiter.set_result(None)
        return self._stop is not None

    @property
    def done(self) -> bool:
        """Whether no more tokens come."""
        return self.finish_reason is not None

    def wait_token(self) -> asyncio.Future[None]:
        """A future that is done when a token or the end comes, or for no reason. The caller has seen all before it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        first = self.waiter
        if first is None or first.done():
            self.waiter = future
        else:  # a second reader follows the first, also when that one is cancelled
            first.add_done_callback(lambda _: _resolve(future))
        return future

    def check_stop_strings(self) -> bool:
        """Look for stop strings in what was pushed. Whether one ended the choice, so that its engine must be told."""
        if self._stop is None:
            return False
        for index in range(len(self._pieces), len(self.token_ids)):
            self._decode_up_to(index)
            if self._stop.stopped:
                self._drop_after(index)
                if self.finish_reason is None:
                    self.finish("stop")
                    return True
                self.finish_reason = "stop"  # its engine ended it with the same token, for another reason
                self.stop_token_id = None
        return False

    def finish(self, reason: FinishReason, stop_token_id: int | None = None) -> None:
        """No more tokens come; the last one is there already."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.stop_token_id = stop_token_id
            self.request.choice_finished()

    def _drop_after(self, index: int) -> None:
        arrivals = self._arrivals
        for _ in range(len(self.token_ids) - index - 1):
            self.token_ids.pop()
            if arrivals is not None:
                del arrivals[len(arrivals) - 1 - arrivals[::-1].index(self.index)]
        del self.logprobs[index + 1 :]

    def text_at(self, index: int) -> str:
        """The text that token `index` made certain."""
        self._decode_up_to(index)
        return self._pieces[index]

    def text(self) -> str:
        """All text so far."""
        self._decode_up_to(len(self.token_ids) - 1)
        return "".join(self._pieces)

    def logprob_at(self, index: int) -> float | None:
        """The log-probability of token `index`, when log-probabilities were asked for."""
        return self.logprobs[index].logprobs[0] if index < len(self.logprobs) else None

    def _decode_up_to(self, index: int) -> None:
        pieces = self._pieces
        if len(pieces) <= index and self._detokenizer is None:
            request = self.request
            self._detokenizer = request.codec.detokenizer(request.params.skip_special_tokens)
        while len(pieces) <= index:
            pieces.append(self._decode(len(pieces)))
        if self.finish_reason is not None and self._detokenizer is not None and len(pieces) == len(self.token_ids):
            pieces[-1] += self._rest()
            self._detokenizer = None

    def _decode(self, index: int) -> str:
        if self._stop is not None and self._stop.stopped:
            return ""
        is_last = index == len(self.token_ids) - 1
        if is_last and self.stop_token_id is not None and not self.request.params.include_stop_str_in_output:
            return ""  # the token that ended the text is no part of it
        text = self._detokenizer.push(self.token_ids[index]) if self._detokenizer else ""
        if self._stop is None or index < self.request.params.min_tokens:
            return text
        return self._stop.push(text)

    def _rest(self) -> str:
        """What was held back until it was certain that nothing follows."""
        rest = self._detokenizer.finish() if self._detokenizer else ""
        if self._stop is None:
            return rest
        if self._stop.stopped:
            return ""
        text = self._stop.push(rest)
        return text if self._stop.stopped else text + self._stop.finish()


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
        "num_moves",
        "num_preemptions",
        "order",
        "params",
        "pinned_engine",
        "prefix_hashes",
        "priority",
        "prompt_logprobs",
        "prompt_token_ids",
        "queued_s",
        "request_id",
        "sampling",
        "scores",
        "session",
        "timer",
    )

    def __init__(
        self,
        *,
        request_id: str,
        wire_id: int,
        prompt_token_ids: npt.NDArray[np.int32],
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
        self.queued_s = 0.0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_moves = 0  # to another engine, because one died
        self.engine_id: int | None = None
        self.scores: dict[int, float] = {}  # of every engine, when it was sent
        self.order = wire_id  # of arrival at this client
        self.error: Exception | None = None
        self.done = False
        self.timer: asyncio.TimerHandle | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
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
            token_ids = np.append(self.prompt_token_ids, choice.token_ids)
            messages.append(self._message(choice.wire_id, token_ids, sampling, 1))
        return messages

    def _message(self, wire_id: int, token_ids: npt.NDArray[np.integer], sampling: Sampling, n: int) -> Add:
        return Add(
            wire_id,
            token_ids.astype("<i4").tobytes(),
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

    def choice_finished(self) -> None:
        """One of the choices has all its tokens."""
        self._num_open -= 1
        if self._num_open == 0:
            self._end()

    def fail(self, error: Exception) -> None:
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
                _resolve(choice.waiter)
        for waiter in self._end_waiters:
            _resolve(waiter)
        self._end_waiters.clear()

    def wait_token(self) -> asyncio.Future[None]:
        """Like that of a choice, for a token of any of them."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for choice in self.open_choices:
            choice.wait_token().add_done_callback(lambda _: _resolve(future))
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
        )

    def timing(self) -> Timing:
        """When what happened, so far."""
        return Timing(
            arrival=self.arrival,
            queued_s=self.queued_s,
            first_token=self.first_token_at,
            last_token=max((c.last_token_at for c in self.choices if c.last_token_at is not None), default=None),
            engine=self.engine_id,
            scores=self.scores,
            num_output_tokens=self.num_tokens,
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


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
