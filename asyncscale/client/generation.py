"""What `generate` returns: an async iterable of tokens that can be awaited instead."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, NoReturn, Protocol, Self

import msgspec

from asyncscale.client.choice import ChoiceStream
from asyncscale.client.completion import Completion, Timing
from asyncscale.client.exceptions import fresh
from asyncscale.client.misuse import no_attribute, not_on_its_loop, request_stays_here
from asyncscale.client.stream import RequestStream
from asyncscale.errors import ClientStateError, RequestAbortedError
from asyncscale.messages import FinishReason


class TokenSource(Protocol):
    """What a token asks for what is not its own: the choice that it belongs to, or what is left of that."""

    @property
    def index(self) -> int: ...
    def text_at(self, index: int, /) -> str: ...
    def logprob_at(self, index: int, /) -> float | None: ...


class Token(msgspec.Struct, eq=False, gc=False):
    """One generated token. `str(token)` is its text.

    token_id: int. index: its place among the tokens of its choice, from 0. choice: which of the n completions it
    belongs to. text: what this token made certain; characters that span tokens come with the last of these, and what
    may be the start of a stop string waits until it is not. logprob: natural logarithm, when log-probabilities were
    asked for, else None. finish_reason: on a choice's last token, why it ended ("stop" or "length"), else None.
    """

    _source: TokenSource
    index: int
    token_id: int
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        return self._source.text_at(self.index)

    @property
    def choice(self) -> int:
        return self._source.index

    @property
    def logprob(self) -> float | None:
        return self._source.logprob_at(self.index)

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

    __slots__ = ("__weakref__", "_abort", "_client", "_loop", "_stream")

    if not TYPE_CHECKING:  # type checkers say as much of their own

        def __getattr__(self, name: str) -> NoReturn:
            raise no_attribute(self, name, "(await generation)")

        def __iter__(self) -> NoReturn:
            raise TypeError("a Generation is read with `async for`; synchronous programs use asyncscale.blocking")

        def __reduce__(self) -> NoReturn:
            raise request_stays_here()

    def __init__(
        self, stream: RequestStream, abort: Callable[[RequestStream, Exception], None], client: object = None
    ) -> None:
        self._stream = stream
        self._abort = abort
        self._client = client  # not to be forgotten, and with it its engines, while somebody reads this
        self._loop = asyncio.get_running_loop()

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._stream.done

    @property
    def num_tokens(self) -> int:
        """How many tokens have arrived, of all choices."""
        return self._stream.num_tokens

    @property
    def timing(self) -> Timing:
        """When what happened, so far; also of one that failed."""
        return self._stream.timing()

    def abort(self) -> None:
        """End it on its engine. Who reads it gets RequestAbortedError. Does nothing when it has ended."""
        if not self._stream.done:
            self._abort(self._stream, RequestAbortedError(f"request {self.request_id!r} was aborted"))

    def __aiter__(self) -> Reader:
        stream = self._stream
        if stream.arrivals is None:
            return _ChoiceReader(self, stream.choices[0])
        return _InterleavedReader(self, stream, stream.arrivals)

    def __await__(self) -> Generator[object, None, Completion]:
        stream = self._stream
        while not stream.done:
            if asyncio._get_running_loop() is not self._loop:
                raise self._not_on_its_loop()
            try:
                yield from stream.wait_end().__await__()
            except asyncio.CancelledError:
                self.abort()
                raise
        if stream.error is not None:
            raise fresh(stream.error)
        return stream.completion()

    def __repr__(self) -> str:
        state = "ended" if self.done else "running"
        cure = "`await` gives all of it, `async for` reads it"
        return f"<Generation {self.request_id!r} {state}, {self.num_tokens} tokens: {cure}>"

    def _not_on_its_loop(self) -> ClientStateError:
        return not_on_its_loop(f"request {self.request_id!r}", self._loop)

    def _repr_html_(self) -> str:
        from asyncscale.notebook.completion_card import generation_html

        return generation_html(self)

    def __del__(self) -> None:
        if not self._stream.done:  # when the interpreter ends, functions may go before this does
            _abort_unread(self._loop, self._stream, self._abort, ForgottenError)


class ForgottenError(RequestAbortedError):
    """Nobody has read the request, and nobody can any more: so nobody sees this, but whoever looks at its stream."""


class Reader(ABC):
    """One pass over the tokens. When it goes away before the end, its loop was left early."""

    __slots__ = ("_generation",)

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __aiter__(self) -> Self:
        return self

    @abstractmethod
    async def __anext__(self) -> Token: ...

    @property
    @abstractmethod
    def has_arrived(self) -> bool:
        """Whether the next token is there already."""

    async def _wait(self, source: ChoiceStream | RequestStream) -> None:
        """Return when there may be more; raise when there is not."""
        if source.done:
            error = self._generation._stream.error
            raise StopAsyncIteration if error is None else fresh(error)
        if asyncio._get_running_loop() is not self._generation._loop:
            raise self._generation._not_on_its_loop()
        try:
            await source.wait_token()
        except asyncio.CancelledError:
            self._generation.abort()
            raise

    def __del__(self) -> None:
        generation = self._generation
        if not generation.done:
            _abort_unread(generation._loop, generation._stream, generation._abort)


class _ChoiceReader(Reader):
    """The tokens of a request's only choice."""

    __slots__ = ("_choice", "_next")

    def __init__(self, generation: Generation, choice: ChoiceStream) -> None:
        super().__init__(generation)
        self._choice = choice
        self._next = 0

    @property
    def has_arrived(self) -> bool:
        return self._next < len(self._choice.token_ids)

    async def __anext__(self) -> Token:
        choice, index = self._choice, self._next
        while index >= len(choice.token_ids):
            await self._wait(choice)
        self._next = index + 1
        return _token(choice, index)


class _InterleavedReader(Reader):
    """The tokens of several choices, in the order in which they came."""

    __slots__ = ("_arrivals", "_cursors", "_next", "_stream")

    def __init__(self, generation: Generation, stream: RequestStream, arrivals: list[int]) -> None:
        super().__init__(generation)
        self._stream = stream
        self._arrivals = arrivals
        self._next = 0
        self._cursors = [0] * len(stream.choices)

    @property
    def has_arrived(self) -> bool:
        return self._next < len(self._arrivals)

    async def __anext__(self) -> Token:
        while self._next >= len(self._arrivals):
            await self._wait(self._stream)
        number = self._arrivals[self._next]
        index = self._cursors[number]
        self._next += 1
        self._cursors[number] += 1
        return _token(self._stream.choices[number], index)


def _token(choice: ChoiceStream, index: int) -> Token:
    token_ids = choice.token_ids
    is_last = index == len(token_ids) - 1
    return Token(choice, index, token_ids[index], choice.finish_reason if is_last else None)


def _abort_unread(
    loop: asyncio.AbstractEventLoop,
    stream: RequestStream,
    abort: Callable[[RequestStream, Exception], None],
    kind: type[RequestAbortedError] = RequestAbortedError,
) -> None:
    """End a request whose reader went away. May run in any thread: wherever the garbage collector does."""
    if loop.is_closed():
        return
    error = kind(f"request {stream.request_id!r} was left before its end")
    if asyncio._get_running_loop() is loop:
        abort(stream, error)
    else:
        loop.call_soon_threadsafe(abort, stream, error)
