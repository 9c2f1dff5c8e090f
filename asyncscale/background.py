"""An event loop in a thread of its own, for callers that have none, or whose own must not wait."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, ParamSpec, TypeVar

import uvloop

from asyncscale.errors import ClientClosedError, ClientStateError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_EXIT_TIMEOUT_S = 2.0


class BackgroundLoop:
    """A running uvloop in a daemon thread, used from any other thread::

        loop = BackgroundLoop("my-loop")
        completion = loop.run(ask(client))
        loop.close()

    name: of the thread. It ends with `close`, when it is garbage, and with the program.
    Raises ClientClosedError after `close`, and ClientStateError in its own thread, which would wait for itself, and in
    a fork, where that thread does not exist.
    """

    def __init__(self, name: str = "asyncscale-loop") -> None:
        self._loop = uvloop.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=_serve, args=(self._loop, self._stop), name=name, daemon=True)
        self._owner_pid = os.getpid()
        # What is handed over is there before the loop stops. Reentrant: finalizers hand something over, too.
        self._lock = threading.RLock()
        self._closed = False
        self._finalizer = weakref.finalize(self, _stop, self._owner_pid, self._loop, self._stop)
        self._finalizer.atexit = False  # _close_all does more
        _open.add(self)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether its thread has ended, so that nothing of it runs beside the caller."""
        return not self._thread.is_alive()

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of that which made it, so that its thread does not exist here."""
        return os.getpid() != self._owner_pid

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start it on the loop, and return its future at once; cancelling that cancels the coroutine."""
        with _closed_on_error(coroutine):
            return self._hand_over(lambda: asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run it on the loop, and wait for its result or exception.

        It is cancelled when the wait ends before it does: by Ctrl-C, or TimeoutError after `timeout` seconds.
        """
        with _closed_on_error(coroutine):
            self.check_may_wait()
        return self._wait(self.submit(coroutine), timeout)

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it in the loop's thread, and wait for what it returns or raises."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        self.check_may_wait()
        self.call_soon(call)
        return self._wait(future, None)

    def call_soon(self, function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call it in the loop's thread soon, in the order of these calls, and wait for nothing."""
        self._hand_over(lambda: self._loop.call_soon_threadsafe(lambda: function(*args, **kwargs)))

    def check_may_wait(self) -> None:
        """Raises ClientStateError in the loop's own thread, where nothing happens while it waits."""
        if self._thread is threading.current_thread():
            raise ClientStateError("called from the background loop's own thread, which would wait for itself: await")

    def close(self, timeout: float | None = 10.0) -> None:
        """Cancel what still runs, wait at most `timeout` seconds for its end, and end the thread. Idempotent."""
        if self.forked:
            return
        self.check_may_wait()
        with self._lock:
            self._closed = True
            self._finalizer.detach()
            _stop(self._owner_pid, self._loop, self._stop)
        _open.discard(self)
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning("thread %s did not end within %g s: something in it blocks", self._thread.name, timeout)

    def _hand_over(self, schedule: Callable[[], T]) -> T:
        if self.forked:
            raise ClientStateError("this background loop belongs to the process that this one is a fork of")
        with self._lock:
            if self._closed:
                raise ClientClosedError("the background loop is closed")
            return schedule()

    def _wait(self, future: concurrent.futures.Future[T], timeout: float | None) -> T:
        try:
            return future.result(timeout)
        except concurrent.futures.CancelledError:
            if self._closed:
                raise ClientClosedError("the background loop was closed meanwhile") from None
            raise
        finally:
            future.cancel()


@contextlib.contextmanager
def _closed_on_error(coroutine: Coroutine[Any, Any, object]) -> Iterator[None]:
    """One that nobody runs would complain that it was never awaited."""
    try:
        yield
    except BaseException:
        coroutine.close()
        raise


def _serve(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(stop.wait())


def _stop(owner_pid: int, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """May run in any thread, the loop's included: wherever the garbage collector does."""
    if os.getpid() == owner_pid and not loop.is_closed():
        loop.call_soon_threadsafe(stop.set)


_open: weakref.WeakSet[BackgroundLoop] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for loop in list(_open):
        loop.close(_EXIT_TIMEOUT_S)
