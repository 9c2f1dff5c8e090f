"""Real processes: whatever a test starts must be gone when it ends."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import uvloop
from programs import processes_of


@pytest.fixture
def runtime_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where clients of this test, and of scripts that inherit its environment, make their private folders."""
    tmp_path_factory.getbasetemp()  # not inside the folder that is removed with this test
    folder = tempfile.mkdtemp(prefix="t-", dir="/tmp")
    before, tempfile.tempdir = tempfile.tempdir, folder
    variable, os.environ["TMPDIR"] = os.environ.get("TMPDIR"), folder
    try:
        yield Path(folder)
    finally:
        tempfile.tempdir = before
        if variable is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = variable
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_left_over(runtime_folders: Path) -> Iterator[None]:
    """Fails the test that leaves a process, a thread, a descriptor or a file behind."""
    me = psutil.Process()
    # Made once per process by the standard library and by libuv, on first use: no leak of the test that comes first.
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()
    uvloop.new_event_loop().close()
    children, threads, descriptors = set(me.children(recursive=True)), set(threading.enumerate()), me.num_fds()
    yield
    wait_until(lambda: not (set(me.children(recursive=True)) - children), "child processes are gone")
    wait_until(lambda: not (set(threading.enumerate()) - threads), "threads are gone")
    wait_until(lambda: me.num_fds() <= descriptors, "descriptors are closed")
    assert [path.name for path in runtime_folders.iterdir() if path.name.startswith("asyncscale-")] == []


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
    """Poll for something that no event tells of, such as another process's end."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:g} s, and it is still not so that {what}")
        time.sleep(0.005)


@pytest.fixture
def workspace(runtime_folders: Path) -> Iterator[Path]:
    """The user's folder. A test whose programs leave orphans fails: these are known by the TMPDIR they inherited."""
    (runtime_folders / "user").mkdir()
    yield runtime_folders / "user"
    deadline = time.monotonic() + 5
    while (left := processes_of(runtime_folders)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in left:
        process.kill()
    assert left == []
