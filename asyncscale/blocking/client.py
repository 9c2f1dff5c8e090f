"""The blocking client: the asynchronous one on a loop in a thread of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from asyncscale.background import BackgroundLoop
from asyncscale.blocking.generation import Generation
from asyncscale.blocking.signatures import arguments_of, arguments_of_method
from asyncscale.client import client as asynchronous
from asyncscale.client import generation as asynchronous_generation
from asyncscale.client.misuse import caller, client_stays_here
from asyncscale.client.policies import EngineLoad
from asyncscale.client.roster import EngineHealth
from asyncscale.errors import ClientClosedError, ClientStateError
from asyncscale.metrics import Metrics


class AsyncScaleClient:
    """`asyncscale.AsyncScaleClient`, for programs without an event loop, with the same arguments::

        with AsyncScaleClient("smollm2-135m-instruct", num_engines=2) as client:
            for token in client.generate("The capital of France is", max_tokens=32):
                print(token, end="", flush=True)

    Any thread may use it, several at once, one that runs an event loop included: that waits meanwhile.
    """

    @arguments_of(asynchronous.AsyncScaleClient)
    def __init__(self, *args: Any, **options: Any) -> None:
        self._prepare(asynchronous.AsyncScaleClient(*args, **options))

    @classmethod
    @arguments_of(asynchronous.AsyncScaleClient.attach)
    def attach(cls, *args: Any, **options: Any) -> AsyncScaleClient:
        """A client of engines that another process owns, whose client may be of either kind: see its `address`."""
        client = cls.__new__(cls)
        client._prepare(asynchronous.AsyncScaleClient.attach(*args, **options))
        return client

    def _prepare(self, client: asynchronous.AsyncScaleClient) -> None:
        self._client = client
        self._background: BackgroundLoop | None = None  # once it is started
        self._starting = threading.Lock()
        self._closed = False
        self._made_at = caller()
        self._finalizer: weakref.finalize[..., AsyncScaleClient] | None = None

    # --- life

    def start(self) -> Self:
        """Fetch the model if need be, start the engines (or attach to them), and return when requests can be served."""
        with self._starting:
            if self._closed:
                raise _closed("start")
            if self._background is not None:
                raise ClientStateError("cannot start the client: it was started already")
            self._background = background = BackgroundLoop("asyncscale-client")
        try:
            background.run(self._client.start())
        except BaseException:
            self.close(drain=False)
            raise
        name = f"{self!r}, made at {self._made_at}"
        self._finalizer = weakref.finalize(self, _end, name, os.getpid(), background, self._client)
        self._finalizer.atexit = False  # the engines end then, and nothing else matters
        return self

    @arguments_of_method(asynchronous.AsyncScaleClient.close)
    def close(self, *args: Any, **options: Any) -> None:
        """End the client and, if it owns them, its engines; requests may finish first.

        As that of `asyncscale.AsyncScaleClient`, and Ctrl-C ends a drain. What had ended can still be read.
        """
        background = self._background
        if background is None or background.ended:
            self._closed = True
            return
        background.check_may_wait()
        closing = self._client.close(*args, **options)
        self._closed = True
        if self._finalizer is not None:
            self._finalizer.detach()
        try:
            background.run(closing)
        except ClientClosedError:
            pass  # another thread was faster
        except BaseException:
            with contextlib.suppress(ClientClosedError):
                background.run(self._client.close(drain=False))
            raise
        finally:
            background.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=False)

    def __reduce__(self) -> NoReturn:
        raise client_stays_here()

    if not TYPE_CHECKING:  # type checkers say as much of their own

        async def __aenter__(self) -> NoReturn:
            raise TypeError("the client of asyncscale.blocking is for `with`: that for `async with` is asyncscale's")

        async def __aexit__(self, *_: object) -> None: ...

    # --- requests

    @arguments_of_method(asynchronous.AsyncScaleClient.generate)
    def generate(self, *args: Any, **options: Any) -> Generation:
        """Start a request and return at once: iterate over the result for tokens, or wait for all of them.

        ::

            for token in client.generate("Once upon a time", temperature=0.8): ...
            completion = client.generate([1, 4093, 198], max_tokens=16).result()
            generations = [client.generate(prompt) for prompt in prompts]
        """
        return self._generation(self._running().call(self._client.generate, *args, **options))

    @arguments_of_method(asynchronous.AsyncScaleClient.submit)
    def submit(self, *args: Any, **options: Any) -> Generation:
        """Like `generate`, but where that raises OverloadedError, wait for a place in the queue."""
        return self._generation(self._running().run(self._client.submit(*args, **options)))

    @arguments_of_method(asynchronous.AsyncScaleClient.chat)
    def chat(self, *args: Any, **options: Any) -> Generation:
        """Like `generate`, for a conversation, which the model's own chat template turns into a prompt.

        ::

            completion = client.chat([{"role": "user", "content": "What is the capital of France?"}]).result()
        """
        return self._generation(self._running().call(self._client.chat, *args, **options))

    # --- engines

    @property
    def address(self) -> str:
        """What `attach` takes, of either kind of client, in this process or another. With `host`, it is a secret."""
        self._started()
        return self._client.address  # also in a fork: to attach there

    def engine_loads(self) -> tuple[EngineLoad, ...]:
        """The newest counts of every engine, and their age. Asks nobody."""
        return self._running().call(self._client.engine_loads)

    def health(self) -> tuple[EngineHealth, ...]:
        """How every engine is: state, age of its last step, restarts, last error. Asks nobody."""
        return self._running().call(self._client.health)

    def metrics(self) -> Metrics:
        """What all engines and all clients have counted until now; see `asyncscale.metrics.Metrics`."""

        async def fresh() -> Metrics:
            return await self._client.metrics()

        return self._running().run(fresh())

    @property
    def num_malformed(self) -> int:
        """How many messages were dropped because they made no sense: see `asyncscale.AsyncScaleClient`."""
        return self._running().call(lambda: self._client.num_malformed)

    def watch_loads(self) -> Iterator[tuple[EngineLoad, ...]]:
        """The engines' loads, now and whenever they change::

            for loads in client.watch_loads():
                if not any(load.waiting for load in loads):
                    break

        Ends when the client is closed.
        """
        changes = self._client.watch_loads()

        async def next_change() -> tuple[EngineLoad, ...] | None:
            return await anext(changes, None)

        with contextlib.suppress(ClientClosedError):
            while (loads := self._running().run(next_change())) is not None:
                yield loads

    @arguments_of_method(asynchronous.AsyncScaleClient.collective_rpc)
    def collective_rpc(self, *args: Any, **options: Any) -> list[Any]:
        """Run a registered engine method exactly once on every engine; results in engine order.

        ::

            client.collective_rpc("kv_cache_stats")
        """
        return self._running().run(self._client.collective_rpc(*args, **options))

    @arguments_of_method(asynchronous.AsyncScaleClient.update_weights)
    def update_weights(self, *args: Any, **options: Any) -> int:
        """Have all engines compute with other weights; requests under way go on with them. Returns their version.

        ::

            client.update_weights("step-100.safetensors")
        """
        return self._running().run(self._client.update_weights(*args, **options))

    # --- use

    def _started(self) -> BackgroundLoop:
        if self._closed:
            raise _closed("use")
        if self._background is None:
            raise ClientStateError(
                "the client is not started: use `with AsyncScaleClient(...) as client:` or `client.start()`"
            )
        return self._background

    def _running(self) -> BackgroundLoop:
        background = self._started()
        if background.forked:
            raise ClientStateError(
                "this client was started by the process that this one is a fork of. "
                "Make one of its own here: AsyncScaleClient.attach(client.address)"
            )
        return background

    def _generation(self, generation: asynchronous_generation.Generation) -> Generation:
        return Generation(generation, self._running(), self)

    def __repr__(self) -> str:
        return f"<blocking {repr(self._client)[1:]}"


def _closed(wanted: str) -> ClientClosedError:
    return ClientClosedError(f"cannot {wanted} the client: it is closed (leaving `with` does that). Make a new one")


_endings: set[concurrent.futures.Future[None]] = set()


def _end(name: str, owner_pid: int, background: BackgroundLoop, client: asynchronous.AsyncScaleClient) -> None:
    """Of a client that nobody closed. May run in any thread: wherever the garbage collector does."""
    if os.getpid() != owner_pid:
        return
    with contextlib.suppress(ClientClosedError):
        ending = background.submit(_close(client, background))
        _endings.add(ending)
        ending.add_done_callback(_endings.discard)
    text = f"unclosed client {name}: use `with`, or client.close()"
    warnings.warn(text, ResourceWarning, stacklevel=3)  # where it was forgotten


async def _close(client: asynchronous.AsyncScaleClient, _: BackgroundLoop) -> None:
    """The loop, which nobody else holds, ends after this."""
    await client.close(drain=False)
