"""What the blocking client's `generate` returns: an iterable of tokens with a result."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import msgspec

from asyncscale.client import generation as asynchronous
from asyncscale.client.completion import Completion, Timing
from asyncscale.client.exceptions import fresh
from asyncscale.client.generation import Token
from asyncscale.client.misuse import no_attribute, request_stays_here
from asyncscale.errors import ClientClosedError

if TYPE_CHECKING:
    from asyncscale.background import BackgroundLoop

T = TypeVar("T")

_NOT_ASYNCHRONOUS = (
    "this is a Generation of asyncscale.blocking, for `for` and `.result()`; "
    "await asyncio.wrap_future(generation.future()), or use asyncscale's AsyncScaleClient"
)


class Generation:
    """A request under way. Read it token by token, or wait for all of it::

        for token in client.generate("Once upon a time"):
            print(token, end="")
        completion = client.generate("Once upon a time").result()

    It runs from the moment it is made, whether anybody reads it or not. Leaving a `for` early, Ctrl-C while waiting
    for it, its timeout, `abort()`, and forgetting it all end it on its engine. Any thread may use it, several at once.
    Raises: RequestTimeoutError, RequestAbortedError, EngineDeadError, ClientClosedError.
    """

    __slots__ = ("__weakref__", "_background", "_client", "_future", "_generation", "_lock")

    if not TYPE_CHECKING:  # type checkers say as much of their own

        def __getattr__(self, name: str) -> NoReturn:
            raise no_attribute(self, name, "generation.result()")

        def __aiter__(self) -> NoReturn:
            raise TypeError(_NOT_ASYNCHRONOUS)

        def __await__(self) -> NoReturn:
            raise TypeError(_NOT_ASYNCHRONOUS)

        def __reduce__(self) -> NoReturn:
            raise request_stays_here()

    def __init__(self, generation: asynchronous.Generation, background: BackgroundLoop, client: object) -> None:
        self._generation = generation
        self._background = background
        self._client = client  # not to be forgotten, and with it its engines, while somebody reads this
        self._future: concurrent.futures.Future[Completion] | None = None
        self._lock = threading.RLock()

    @property
    def request_id(self) -> str:
        return self._generation.request_id

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._generation.done

    @property
    def num_tokens(self) -> int:
        """How many tokens have arrived, of all choices."""
        return self._generation.num_tokens

    @property
    def timing(self) -> Timing:
        """When what happened, so far; also of one that failed."""
        return self._generation.timing

    def abort(self) -> None:
        """End it on its engine. Who reads it gets RequestAbortedError. Does nothing when it has ended."""
        if not self.done:
            with contextlib.suppress(ClientClosedError):  # then it has ended
                self._background.call_soon(self._generation.abort)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the completion.

        Raises TimeoutError after `timeout` seconds, and the request goes on; to end it then, use `generate`'s.
        """
        error = self.exception(timeout)
        if error is not None:
            raise fresh(error)
        return self.future().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end, and return what `result` would raise, or None. Raises TimeoutError."""
        future = self.future()
        if not future.done():
            self._background.check_may_wait()
        try:
            return future.exception(timeout)
        except TimeoutError:
            raise TimeoutError(f"request {self.request_id!r} has not ended within {timeout:g} s; it goes on") from None
        except concurrent.futures.CancelledError:
            raise
        except BaseException:  # Ctrl-C
            self.abort()
            raise

    def future(self) -> concurrent.futures.Future[Completion]:
        """The completion as a future, always the same one. Cancelling it aborts the request.

        Its callbacks run in the client's own thread, which must not wait for anything.

        ::

            for future in concurrent.futures.as_completed([generation.future() for generation in generations]): ...
            completion = await asyncio.wrap_future(generation.future())
        """
        with self._lock:
            if self._future is None:
                self._future = self._submit(lambda: _completion(self._generation))
            return self._future

    def __iter__(self) -> Iterator[Token]:
        arrivals: SimpleQueue[list[Token] | BaseException] = SimpleQueue()  # in the end an exception, or no tokens
        reader = aiter(self._generation)
        self._submit(lambda: _hand_over(reader, arrivals.put)).add_done_callback(lambda end: arrivals.put(_end(end)))
        try:
            while tokens := self._next(arrivals):
                if isinstance(tokens, BaseException):
                    raise fresh(tokens)
                yield from tokens
        finally:
            self.abort()  # it was left early, by Ctrl-C perhaps

    def _next(self, arrivals: SimpleQueue[T]) -> T:
        if arrivals.empty():
            self._background.check_may_wait()
        return arrivals.get()

    def _submit(self, make: Callable[[], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        """Start what reads the request in the loop's thread: text is decoded there, and nowhere else.

        When that thread has ended, what had ended before is read here.
        """
        try:
            return self._background.submit(make())
        except ClientClosedError:
            if not (self._background.ended and self.done):
                raise ClientClosedError("the client was closed") from None
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            try:
                make().send(None)
            except StopIteration as end:
                future.set_result(end.value)
            except Exception as error:
                future.set_exception(error)
        return future

    def __repr__(self) -> str:
        state = "ended" if self.done else "running"
        cure = "`.result()` waits for all of it, `for` reads it"
        return f"<Generation {self.request_id!r} {state}, {self.num_tokens} tokens: {cure}>"


class _ReadText(msgspec.Struct, gc=False):
    """What a token of another thread shows of its choice: that goes on changing in the loop's thread."""

    index: int
    text: str
    logprob: float | None

    def text_at(self, _: int) -> str:
        return self.text

    def logprob_at(self, _: int) -> float | None:
        return self.logprob


async def _completion(generation: asynchronous.Generation) -> Completion:
    return await generation


async def _hand_over(reader: asynchronous.Reader, put: Callable[[list[Token]], None]) -> None:
    """Tokens go to the other thread as they arrive: those that have come together go together."""
    tokens: list[Token] = []
    async for token in reader:
        text = _ReadText(token.choice, token.text, token.logprob)
        tokens.append(Token(text, token.index, token.token_id, token.finish_reason))
        if not reader.has_arrived:
            put(tokens)
            tokens = []


def _end(reading: concurrent.futures.Future[None]) -> list[Token] | BaseException:
    if reading.cancelled():
        return ClientClosedError("the client was closed")
    return reading.exception() or []
