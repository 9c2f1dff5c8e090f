"""The loop in a thread: what callers in other threads may do to it, and what it refuses."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from asyncscale.background import BackgroundLoop
from asyncscale.errors import ClientClosedError, ClientStateError


@pytest.fixture
def loop() -> Iterator[BackgroundLoop]:
    loop = BackgroundLoop("background")
    yield loop
    loop.close()


async def running_thread() -> threading.Thread:
    return threading.current_thread()


class Waiting:
    """A coroutine that waits until it is cancelled, and says so."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self) -> None:
        self.began.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def test_coroutines_and_functions_run_in_the_named_thread(loop: BackgroundLoop) -> None:
    thread = loop.run(running_thread())
    assert (thread.name, thread.daemon) == ("background", True)
    assert loop.call(threading.current_thread) is thread
    assert loop.call(lambda *, value: value + 1, value=1) == 2


def test_exceptions_arrive_where_the_result_would(loop: BackgroundLoop) -> None:
    async def fail() -> None:
        raise LookupError("lost")

    with pytest.raises(LookupError, match="lost"):
        loop.run(fail())
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 // 0)


def test_a_timeout_cancels_the_coroutine(loop: BackgroundLoop) -> None:
    waiting = Waiting()
    with pytest.raises(TimeoutError):
        loop.run(waiting(), timeout=0.01)
    assert waiting.cancelled.wait(5)


def test_many_threads_use_it_at_once(loop: BackgroundLoop) -> None:
    async def doubled(value: int) -> int:
        await asyncio.sleep(0)
        return 2 * value

    results: dict[int, int] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: loop.run(doubled(i))})) for i in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: 2 * i for i in range(50)}


async def test_another_running_loop_may_wait_for_it(loop: BackgroundLoop) -> None:
    assert loop.run(running_thread()) is not threading.current_thread()


def test_its_own_thread_is_refused_rather_than_left_waiting_for_itself(loop: BackgroundLoop) -> None:
    async def call_back() -> None:
        loop.run(running_thread())

    with pytest.raises(ClientStateError, match="own thread"):
        loop.run(call_back())
    with pytest.raises(ClientStateError, match="own thread"):
        loop.call(loop.call, lambda: None)
    with pytest.raises(ClientStateError, match="own thread"):
        loop.call(loop.close)
    assert loop.call(lambda: 1) == 1


def test_close_cancels_what_runs_and_ends_the_thread() -> None:
    loop, waiting, errors = BackgroundLoop(), Waiting(), list[BaseException]()
    thread = loop.call(threading.current_thread)

    def run() -> None:
        try:
            loop.run(waiting())
        except BaseException as error:
            errors.append(error)

    caller = threading.Thread(target=run)
    caller.start()
    assert waiting.began.wait(5)
    loop.close()
    loop.close()
    caller.join(5)
    assert waiting.cancelled.is_set()
    assert [type(error) for error in errors] == [ClientClosedError]
    assert not thread.is_alive()


def test_after_close_it_says_so() -> None:
    loop = BackgroundLoop()
    loop.close()
    with pytest.raises(ClientClosedError, match="closed"):
        loop.run(running_thread())
    with pytest.raises(ClientClosedError, match="closed"):
        loop.call_soon(print)


def test_close_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    loop, hold = BackgroundLoop("held"), threading.Event()
    loop.call_soon(hold.wait)
    loop.close(timeout=0.01)
    assert "thread held did not end" in caplog.text
    hold.set()
    loop.close()


def test_one_that_nobody_holds_ends_its_thread() -> None:
    loop = BackgroundLoop()
    thread, dead = loop.call(threading.current_thread), weakref.ref(loop)
    del loop
    gc.collect()
    assert dead() is None
    thread.join(5)
    assert not thread.is_alive()


def test_a_fork_is_told_that_the_loop_is_not_its_own(loop: BackgroundLoop) -> None:
    loop.call(lambda: None)
    pid = os.fork()
    if pid == 0:
        try:
            loop.run(running_thread(), timeout=5)
        except ClientStateError as error:
            loop.close()
            os._exit(7 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert loop.call(lambda: 1) == 1


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    prelude = "import asyncio, os, signal, sys, threading\nfrom asyncscale.background import BackgroundLoop\n"
    return subprocess.run([sys.executable, "-c", prelude + body], capture_output=True, text=True, timeout=30)


def test_ctrl_c_ends_the_wait_and_cancels_the_coroutine() -> None:
    done = run_script("""
async def wait():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.get_running_loop().create_future()
    except asyncio.CancelledError:
        print("cancelled", flush=True)
        raise
signal.signal(signal.SIGINT, signal.default_int_handler)
loop = BackgroundLoop()
try:
    loop.run(wait())
except KeyboardInterrupt:
    loop.close()
    print("interrupted")
""")
    assert (done.stdout, done.stderr, done.returncode) == ("cancelled\ninterrupted\n", "", 0)


def test_a_program_may_end_without_closing_it() -> None:
    done = run_script("""
async def wait():
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        print("cleaned up")
loop = BackgroundLoop()
loop.call_soon(lambda: asyncio.ensure_future(wait()))
loop.call(lambda: None)
""")
    assert (done.stdout, done.stderr, done.returncode) == ("cleaned up\n", "", 0)
