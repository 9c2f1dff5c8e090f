"""The tokens of one choice of a request, without I/O: tokens in, waiter woken, text made when somebody reads it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from asyncscale.messages import FinishReason, TokenLogprobs
from asyncscale.tokenization.codec import Detokenizer
from asyncscale.tokenization.stop import StopStrings

if TYPE_CHECKING:
    from asyncscale.client.stream import RequestStream


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
            first.add_done_callback(lambda _: resolve(future))
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


def resolve(waiter: asyncio.Future[None]) -> None:
    """Let go on who waits, if nobody has yet."""
    if not waiter.done():
        waiter.set_result(None)
