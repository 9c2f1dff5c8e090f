"""`run_frontends` with real processes: what comes back, what stops, and what is left over (nothing)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from asyncscale import (
    AsyncScaleClient,
    AsyncScaleError,
    EngineDeadError,
    FrontendError,
    SimulatedModel,
    run_frontends,
)
from asyncscale.client import frontends

FAST = SimulatedModel(base_ms=0.2, decode_us=1, prefill_us=0.1)
LONG: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True}


@pytest.fixture
async def client() -> AsyncIterator[AsyncScaleClient]:
    async with AsyncScaleClient(FAST, num_engines=1) as client:
        yield client
        await assert_idle(client)


async def assert_idle(client: AsyncScaleClient) -> None:
    """No engine has a request of anybody's, and every KV block is free."""
    await reach(client, 0)
    for stats in await client.collective_rpc("kv_cache_stats"):
        assert stats["free_blocks"] == stats["num_blocks"]


async def reach(client: AsyncScaleClient, in_flight: int) -> None:
    """Wait until the engines report so many requests."""
    async with asyncio.timeout(10):
        async for loads in client.watch_loads():
            if sum(load.running + load.waiting for load in loads) == in_flight:
                return


async def stream_until_stopped(client: AsyncScaleClient, index: int, folder: Path) -> None:
    """Stream for ever, one request after the other; leave a file that says that this front end was cancelled."""
    try:
        while True:
            await client.generate("x", **LONG)
    except asyncio.CancelledError:
        (folder / f"cancelled-{index}").touch()
        raise


@pytest.fixture
def folder(runtime_folders: Path) -> Path:
    """The user's folder, for what front ends write."""
    (runtime_folders / "user").mkdir()
    return runtime_folders / "user"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what comes back


async def test_results_come_in_the_order_of_the_index_each_from_a_uvloop_in_a_process_of_its_own(
    client: AsyncScaleClient,
) -> None:
    async def main(client: AsyncScaleClient, index: int) -> tuple[int, int, bool, int]:
        completion = await client.generate("x", max_tokens=200 * (4 - index), ignore_eos=True)
        is_uvloop = isinstance(asyncio.get_running_loop(), uvloop.Loop)
        return index, os.getpid(), is_uvloop, len(completion.token_ids)

    results = await run_frontends(main, 4, client.address)
    assert [index for index, *_ in results] == [0, 1, 2, 3]
    assert len({pid for _, pid, *_ in results} | {os.getpid()}) == 5
    assert [rest for _, _, *rest in results] == [[True, 800], [True, 600], [True, 400], [True, 200]]


async def ask(client: AsyncScaleClient, index: int, *, num_tokens: int = 1) -> int:
    return len((await client.generate("x", max_tokens=num_tokens, ignore_eos=True)).token_ids)


class Asker:
    num_tokens = 4

    async def ask(self, client: AsyncScaleClient, index: int) -> int:
        return await ask(client, index, num_tokens=self.num_tokens)

    def __call__(self, client: AsyncScaleClient, index: int) -> asyncio.Future[int]:
        return asyncio.ensure_future(self.ask(client, index))


async def test_main_may_be_any_function_and_several_calls_run_at_once(client: AsyncScaleClient) -> None:
    two = 2

    async def closure(client: AsyncScaleClient, index: int) -> int:
        return await ask(client, index, num_tokens=two)

    mains: list[Any] = [
        ask,
        closure,
        lambda client, index: ask(client, index, num_tokens=3),
        Asker().ask,
        functools.partial(functools.partial(ask), num_tokens=5),
        Asker(),
    ]
    results = await asyncio.gather(*(run_frontends(main, 1, client.address) for main in mains))
    assert results == [[1], [2], [3], [4], [5], [4]]


async def test_a_large_main_and_a_large_result_pass(client: AsyncScaleClient) -> None:
    data = os.urandom(20_000_000)

    async def main(client: AsyncScaleClient, index: int) -> bytes:
        return data[::-1]

    assert await run_frontends(main, 2, client.address) == [data[::-1]] * 2


async def test_async_generators_and_tasks_that_main_leaves_behind_are_ended(
    client: AsyncScaleClient, folder: Path
) -> None:
    async def main(client: AsyncScaleClient, index: int) -> None:
        async def numbers() -> AsyncIterator[int]:
            try:
                yield 1
            finally:
                (folder / "generator").touch()

        async def wait() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                (folder / "task").touch()

        main.left = [numbers(), asyncio.ensure_future(wait())]  # type: ignore[attr-defined]
        await anext(main.left[0])  # type: ignore[attr-defined]

    await run_frontends(main, 1, client.address)
    assert names(folder) == {"generator", "task"}


async def test_processes_that_main_starts_can_be_terminated(client: AsyncScaleClient) -> None:
    async def main(client: AsyncScaleClient, index: int) -> list[int]:
        child = await asyncio.to_thread(subprocess.Popen, ["sleep", "60"])
        child.terminate()
        fork = os.fork()
        if fork == 0:
            time.sleep(20)  # noqa: ASYNC251
            os._exit(0)
        os.kill(fork, signal.SIGTERM)
        _, status = await asyncio.to_thread(os.waitpid, fork, 0)
        return [await asyncio.to_thread(child.wait), os.waitstatus_to_exitcode(status)]

    assert await run_frontends(main, 1, client.address) == [[-signal.SIGTERM, -signal.SIGTERM]]


# --- exceptions


class KeywordError(Exception):
    def __init__(self, code: int, *, why: str) -> None:
        super().__init__(f"{why} ({code})")
        self.code = code
        self.why = why


async def test_an_exception_is_raised_in_the_caller_as_it_was(client: AsyncScaleClient) -> None:
    async def main(client: AsyncScaleClient, index: int) -> None:
        dead = EngineDeadError("died", engine_id=1, exit_code=-9, stderr_tail="tail")
        raise ExceptionGroup("two", [KeywordError(7, why="because"), dead])

    with pytest.raises(ExceptionGroup, match="two") as caught:
        await run_frontends(main, 1, client.address)
    mine, dead = caught.value.exceptions
    assert isinstance(mine, KeywordError)
    assert (mine.code, mine.why, str(mine)) == (7, "because", "because (7)")
    assert isinstance(dead, EngineDeadError)
    assert (dead.engine_id, dead.exit_code, dead.stderr_tail) == (1, -9, "tail")
    assert "--- traceback in front end 0 ---" in caught.value.__notes__[0]
    assert 'raise ExceptionGroup("two"' in caught.value.__notes__[0]


async def test_what_cannot_be_pickled_is_told_in_words(client: AsyncScaleClient) -> None:
    async def raises(client: AsyncScaleClient, index: int) -> None:
        error = ValueError("odd")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    async def returns(client: AsyncScaleClient, index: int) -> object:
        return client

    with pytest.raises(FrontendError, match="front end 0 raised ValueError: odd, which cannot be pickled") as caught:
        await run_frontends(raises, 1, client.address)
    assert (caught.value.index, caught.value.exit_code) == (0, None)
    assert "raise error" in caught.value.__notes__[0]
    with pytest.raises(FrontendError, match="front end 0 returned a AsyncScaleClient that cannot be pickled"):
        await run_frontends(returns, 1, client.address)


class LoadsNowhereElse:
    """Can be pickled, and unpickled only where it is from."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _only_here, (os.getpid(),)


def _only_here(pid: int) -> None:
    if pid != os.getpid():
        raise pickle.UnpicklingError("not here")


async def test_what_cannot_be_unpickled_is_told_in_words(client: AsyncScaleClient) -> None:
    async def returns(client: AsyncScaleClient, index: int) -> object:
        return LoadsNowhereElse()

    async def raises(client: AsyncScaleClient, index: int) -> object:
        raise ValueError(LoadsNowhereElse())

    for main in (returns, raises):
        with pytest.raises(FrontendError, match="cannot be unpickled here"):
            await run_frontends(main, 1, client.address)


async def test_a_process_that_ends_without_a_result_is_told_with_its_exit_code(client: AsyncScaleClient) -> None:
    ends: list[tuple[Callable[[], object], int]] = [
        (lambda: os._exit(3), 3),
        (lambda: sys.exit(4), 4),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    ]

    async def main(client: AsyncScaleClient, index: int, *, end: Callable[[], object]) -> None:
        if index == 1:
            end()
        await asyncio.Event().wait()

    for end, code in ends:
        with pytest.raises(FrontendError, match="front end 1 ended without a result") as caught:
            await run_frontends(functools.partial(main, end=end), 2, client.address)
        assert (caught.value.index, caught.value.exit_code) == (1, code)


async def test_a_killed_front_end_is_noticed_at_once_though_a_fork_of_it_lives_on(
    client: AsyncScaleClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontends, "STOP_GRACE_S", 1000.0)

    async def main(client: AsyncScaleClient, index: int) -> None:
        fork = os.fork()
        if fork == 0:
            signal.pause()
        (folder / "fork").write_text(str(fork))
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        with pytest.raises(FrontendError, match="killed by SIGKILL") as caught:
            await run_frontends(main, 1, client.address)
        assert caught.value.exit_code == -signal.SIGKILL
    finally:
        os.kill(int((folder / "fork").read_text()), signal.SIGKILL)


async def test_a_main_that_cancels_itself_does_not_cancel_the_caller(client: AsyncScaleClient) -> None:
    async def main(client: AsyncScaleClient, index: int) -> None:
        raise asyncio.CancelledError

    with pytest.raises(FrontendError, match="front end 0 was cancelled from within"):
        await run_frontends(main, 1, client.address)


# --- misuse


async def _main(client: AsyncScaleClient, index: int) -> None: ...


@pytest.mark.parametrize(
    ("main", "count", "address", "error", "text"),
    [
        (None, 1, "ipc://x", TypeError, "main must be an async function"),
        (_main, 0, "ipc://x", ValueError, "count must be at least 1, got 0"),
        (_main, 1.0, "ipc://x", TypeError, "count must be an integer, got float"),
        (_main, True, "ipc://x", TypeError, "count must be an integer, got bool"),
        (_main, 1, "http://x", ValueError, "address must be"),
        (functools.partial(_main, lock=threading.Lock()), 1, "ipc://x", TypeError, "cannot be sent to another process"),
    ],
)
async def test_wrong_arguments_are_refused_before_a_process_starts(
    main: Any, count: Any, address: str, error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(frontends, "start_process")
    with pytest.raises(error, match=text):
        await run_frontends(main, count, address)


async def test_a_main_that_holds_a_client_of_the_caller_is_refused(client: AsyncScaleClient) -> None:
    async def main(_: AsyncScaleClient, index: int) -> None:
        await client.generate("x")

    with pytest.raises(TypeError, match="a client is passed to it"):
        await run_frontends(main, 1, client.address)


async def test_a_main_that_is_not_async_is_refused(client: AsyncScaleClient) -> None:
    main: Any = lambda client, index: index  # noqa: E731
    with pytest.raises(TypeError, match="main must be an async function, but it returned int"):
        await run_frontends(main, 1, client.address)


async def test_an_address_where_nobody_is_raises_as_attach_does() -> None:
    with pytest.raises(AsyncScaleError, match="nobody is at 'ipc:///tmp/nobody'"):
        await run_frontends(_main, 2, "ipc:///tmp/nobody")


# --- stopping


async def test_when_one_fails_the_others_are_cancelled_and_their_requests_leave_the_engines(
    client: AsyncScaleClient, folder: Path
) -> None:
    async def main(client: AsyncScaleClient, index: int) -> None:
        if index != 2:
            await stream_until_stopped(client, index, folder)
        await reach(client, 3)
        raise KeywordError(1, why="enough")

    with pytest.raises(KeywordError, match="enough") as caught:
        await run_frontends(main, 4, client.address)
    assert "in front end 2" in caught.value.__notes__[0]
    assert names(folder) == {"cancelled-0", "cancelled-1", "cancelled-3"}
    await assert_idle(client)


async def test_cancelling_the_caller_stops_all(client: AsyncScaleClient, folder: Path) -> None:
    main = functools.partial(stream_until_stopped, folder=folder)
    running = asyncio.ensure_future(run_frontends(main, 3, client.address))
    await reach(client, 3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert names(folder) == {"cancelled-0", "cancelled-1", "cancelled-2"}
    await assert_idle(client)


async def test_cancelling_the_caller_while_processes_start_leaves_nothing(client: AsyncScaleClient) -> None:
    for turns in (1, 3):
        running = asyncio.ensure_future(run_frontends(_main, 3, client.address))
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


async def test_who_does_not_stop_is_killed_and_a_failure_is_told_though_its_threads_go_on(
    client: AsyncScaleClient, folder: Path
) -> None:
    async def main(client: AsyncScaleClient, index: int) -> None:
        if index != 2:
            stream = aiter(client.generate("x", **LONG))
            await anext(stream)
            (folder / str(os.getpid())).touch()
            if index == 0:
                time.sleep(1000)  # noqa: ASYNC251
            os.kill(os.getpid(), signal.SIGSTOP)
        while len(names(folder)) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 1000)
        raise KeywordError(1, why="blocked")

    with pytest.raises(KeywordError, match="blocked"):
        await run_frontends(main, 3, client.address)
    pids = names(folder)
    assert len(pids) == 2
    assert not any(psutil.pid_exists(int(pid)) for pid in pids)
    await assert_idle(client)


# --- whole programs


PRELUDE = """
import asyncio, os, pathlib, signal, sys, time, uvloop
from asyncscale import *
FAST = SimulatedModel(base_ms=0.2)
"""
PROGRAM = """
print("once", flush=True)
class Failed(Exception):
    def __init__(self, index): self.index = index
async def main(client, index):
    tokens = await client.generate("x", max_tokens=3, ignore_eos=True)
    sys.stdout.write(f"hello {sys.argv[1]}\\n")  # in one write, as print does only where it buffers
    sys.stdout.flush()
    if index == 1 and sys.argv[2] == "fail":
        raise Failed(index)
    return len(tokens.token_ids)
async def run():
    async with AsyncScaleClient(FAST, num_engines=1) as client:
        return await run_frontends(main, 2, client.address)
for runner in (asyncio.run, uvloop.run):
    try:
        print(runner(run()), flush=True)
    except Failed as error:
        print("failed", error.index, flush=True)
"""
STREAMERS = """
async def main(client, index):
    try:
        if index == 2:
            stream = aiter(client.generate("x", max_tokens=8000, ignore_eos=True))
            await anext(stream)
            time.sleep(1000)
        while True:
            await client.generate("x", max_tokens=8000, ignore_eos=True)
    finally:
        pathlib.Path(f"ended-{index}").touch()
def fork():
    pid = os.fork() if len(sys.argv) > 3 else os.getpid()
    if pid == 0:
        signal.pause()
    print(pid, flush=True)
async def run():
    fork()
    running = asyncio.ensure_future(run_frontends(main, int(sys.argv[2]), sys.argv[1]))
    await asyncio.sleep(0)
    fork()  # holds what the caller holds when it has begun
    await running
asyncio.run(run())
"""


def script(folder: Path, body: str) -> str:
    path = folder / "script.py"
    path.write_text(PRELUDE + textwrap.dedent(body))
    return str(path)


@pytest.mark.parametrize(("how", "ending"), [("return", "[3, 3]"), ("fail", "failed 1")])
def test_a_script_without_a_main_guard_runs_once_and_its_front_ends_print_where_it_does(
    folder: Path, how: str, ending: str
) -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", script(folder, PROGRAM), "world", how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    lines = done.stdout.splitlines()
    assert (done.stderr, done.returncode) == ("", 0)
    assert lines.count("once") == 1
    assert lines.count(ending) == 2
    assert 2 <= lines.count("hello world") <= 4
    assert len(lines) == 3 + lines.count("hello world")


@contextlib.contextmanager
def caller(folder: Path, address: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program that runs front ends on engines of this process. Forks of it, if it has any, live as long as this."""
    with subprocess.Popen(
        [sys.executable, script(folder, STREAMERS), address, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        forks = [int(process.stdout.readline()) for _ in range(2)]
        try:
            yield process
        finally:
            for pid in {process.pid, *forks}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


async def test_front_ends_end_with_a_caller_that_is_killed_though_its_forks_live_on(
    client: AsyncScaleClient, folder: Path
) -> None:
    with caller(folder, client.address, "3", "fork") as process:
        await reach(client, 3)
        children = psutil.Process(process.pid).children()
        front_ends = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(front_ends) == 3
        process.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, front_ends, 10)
        assert alive == []
        assert names(folder) == {"script.py", "ended-0", "ended-1"}  # the third one's event loop was blocked
        await assert_idle(client)


async def test_ctrl_c_is_the_callers_affair(client: AsyncScaleClient, folder: Path) -> None:
    with caller(folder, client.address, "2") as process:
        await reach(client, 2)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = await asyncio.to_thread(process.communicate, timeout=10)
        assert process.returncode == -signal.SIGINT
        assert stderr.count("KeyboardInterrupt\n") == 1
        assert stderr.count("Traceback") == 2  # the task's cancellation, and asyncio.run's KeyboardInterrupt
        assert names(folder) == {"script.py", "ended-0", "ended-1"}
        await assert_idle(client)
