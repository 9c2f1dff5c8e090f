"""What `generate` returns: an async iterable of tokens that can be awaited instead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator

import msgspec

from asyncscale.client.completion import Completion
from asyncscale.client.stream import ChoiceStream, RequestStream
from asyncscale.errors import RequestAbortedError
from asyncscale.messages import FinishReason


class Token(msgspec.Struct, eq=False, gc=False):
    """One generated token. `str(token)` is its text.

    token_id: int. index: its place among the tokens of its choice, from 0. choice: which of the n completions it
    belongs to. text: what this token made certain; characters that span tokens come with the last of these, and what
    may be the start of a stop string waits until it is not. logprob: natural logarithm, when log-probabilities were
    asked for, else None. finish_reason: on a choice's last token, why it ended ("stop" or "length"), else None.
    """

    _stream: ChoiceStream
    index: int
    token_id: int
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        return self._stream.text_at(self.index)

    @property
    def choice(self) -> int:
        return self._stream.index

    @property
    def logprob(self) -> float | None:
        return self._stream.logprob_at(self.index)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Token(text={self.text!r}, token_id={self.token_id}, index={self.index}, choice={self.choice})"


class Generation:
    """A request under way. Read it token by token, or await all of it::

        async for token in client.generate("Once upon a time"):
            print(token, end="")
        completion = await client.generate("Once upon a time")

    It runs from the moment it is made, whether anybody reads it or not. Leaving an `async for` early, cancelling the
    task that reads or awaits it, its timeout, `abort()`, and forgetting it all end it on its engine.
    Raises: RequestTimeoutError, RequestAbortedError, EngineDeadError, ClientClosedError.
    """

    __slots__ = ("__weakref__", "_abort", "_loop", "_stream")

    def __init__(self, stream: RequestStream, abort: Callable[[RequestStream, Exception], None]) -> None:
        self._stream = stream
        self._abort = abort
        self._loop = asyncio.get_running_loop()

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._stream.done

    def abort(self) -> None:
        """End it on its engine. Who reads it gets RequestAbortedError. Does nothing when it has ended."""
        if not self._stream.done:
            self._abort(self._stream, RequestAbortedError(f"request {self.request_id!r} was aborted"))

    def __aiter__(self) -> AsyncIterator[Token]:
        return _TokenIterator(self, self._stream)

    def __await__(self) -> Generator[object, None, Completion]:
        stream = self._stream
        while not stream.done:
            try:
                yield from stream.wait_end().__await__()
            except asyncio.CancelledError:
                self.abort()
                raise
        if stream.error is not None:
            raise _as_raised(stream.error)
        return stream.completion()

    def __repr__(self) -> str:
        state = "ended" if self.done else "running"
        return f"<Generation {self.request_id!r} {state}, {self._stream.num_tokens} tokens>"

    def __del__(self) -> None:
        _abort_unread(self._loop, self._stream, self._abort)


class _TokenIterator:
    """One pass over the tokens. When it goes away before the end, its loop was left early."""

    __slots__ = ("_arrivals", "_choice", "_cursors", "_generation", "_next", "_stream")

    def __init__(self, generation: Generation, stream: RequestStream) -> None:
        self._generation = generation
        self._stream = stream
        self._next = 0
        self._choice = stream.choices[0]
        # What grows by one with each token: of several choices the order over all, of one its own tokens.
        self._arrivals = self._choice.token_ids if stream.arrivals is None else stream.arrivals
        self._cursors = [0] * len(stream.choices)

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        position = self._next
        while position >= len(self._arrivals):
            stream = self._stream
            if stream.done:
                if stream.error is not None:
                    raise _as_raised(stream.error)
                raise StopAsyncIteration
            try:
                await stream.wait_token()
            except asyncio.CancelledError:
                self._generation.abort()
                raise
        self._next = position + 1
        if self._stream.arrivals is not None:
            return self._token_of_several(position)
        choice = self._choice
        finish_reason = choice.finish_reason
        if finish_reason is not None and self._next < len(self._arrivals):
            finish_reason = None
        return Token(choice, position, self._arrivals[position], finish_reason)

    def _token_of_several(self, position: int) -> Token:
        number = self._arrivals[position]
        choice = self._stream.choices[number]
        index = self._cursors[number]
        self._cursors[number] = index + 1
        is_last = index == len(choice.token_ids) - 1
        return Token(choice, index, choice.token_ids[index], choice.finish_reason if is_last else None)

    def __del__(self) -> None:
        generation = self._generation
        _abort_unread(generation._loop, self._stream, generation._abort)


def _abort_unread(
    loop: asyncio.AbstractEventLoop, stream: RequestStream, abort: Callable[[RequestStream, Exception], None]
) -> None:
    """End a request whose reader went away. May run in any thread: wherever the garbage collector does."""
    if stream.done or loop.is_closed():
        return
    error = RequestAbortedError(f"request {stream.request_id!r} was left before its end")
    if asyncio._get_running_loop() is loop:
        abort(stream, error)
    else:
        loop.call_soon_threadsafe(abort, stream, error)


def _as_raised(error: Exception) -> Exception:
    # Raised anew each time: a traceback must not grow with every reader.
    return error.with_traceback(None)
