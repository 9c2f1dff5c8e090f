"""The end of a child process: wait for it, learn how it came about, bring it about."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable
from multiprocessing.process import BaseProcess

from asyncscale.progress import read_small_file

# Between a process's last sign of life and the moment when it can be collected.
_COLLECT_S = 2.0
_LOOK_INTERVAL_S = 0.05


async def wait_exit(process: BaseProcess, timeout: float) -> bool:
    """Wait at most `timeout` seconds for its end. Whether it has ended."""
    # Without a task of its own: Ctrl-C may hit in here, and what it hits it ends, and whatever waits for that.
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    exited = False

    def on_exit() -> None:
        nonlocal exited
        exited = True
        wake()

    def wake() -> None:
        if not look.done():
            look.set_result(None)

    look = loop.create_future()
    loop.add_reader(process.sentinel, on_exit)
    try:
        # What was forked from the process holds its sentinel open, so look at the process itself as well.
        while not exited and process.exitcode is None and loop.time() < deadline:
            look = loop.create_future()
            timer = loop.call_later(_LOOK_INTERVAL_S, wake)
            try:
                await look
            finally:
                timer.cancel()
    finally:
        loop.remove_reader(process.sentinel)
    return exited or process.exitcode is not None


async def wait_exits(processes: Iterable[BaseProcess], timeout: float) -> None:
    """Wait at most `timeout` seconds for the end of all."""
    deadline = time.monotonic() + timeout
    for process in processes:
        await wait_exit(process, deadline - time.monotonic())


def collect_exit_code(process: BaseProcess) -> int | None:
    """Of a process that its sentinel has shown to be ending: it becomes collectable within moments."""
    process.join(_COLLECT_S)
    return process.exitcode


def release(process: BaseProcess) -> None:
    """Kill the process if it still runs, collect it, and close its descriptors."""
    if process.is_alive():
        process.kill()
    process.join(_COLLECT_S)
    with contextlib.suppress(ValueError):  # where somebody else collects children, its end is never known here
        process.close()


def activity(pid: int) -> tuple[str | None, float | None]:
    """State (one letter: "T" is stopped) and seconds of CPU used so far, of all its threads; None where the system, or
    a process that is gone, does not tell. Format: proc_pid_stat(5) of Linux."""
    try:
        stat = read_small_file(f"/proc/{pid}/stat")
    except OSError:
        return None, None
    fields = stat.rpartition(b")")[2].split()  # before it, a name that may hold anything
    return fields[0].decode(), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def describe_exit(code: int | None) -> str:
    """How a process ended, for people: "exit code 1", "killed by SIGKILL"."""
    if code is None:
        return "exit code unknown"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
