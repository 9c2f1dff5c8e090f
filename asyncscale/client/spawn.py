"""Starts engines and front ends by multiprocessing, less what it does for ordinary children and would harm them.

- The spawn method imports the parent's main module in the child, so that a script without the usual guard starts itself
  over; and it takes the child to the parent's folder, which may be gone, or hold modules named like those of the
  standard library. Our children need neither.
- A daemonic process, such as a worker of a Pool, may not have children, lest they outlive it. Ours do not:
  the lifeline ends them.
- At the exit of a process, and of each of its forks, its children are joined or terminated. The lifeline ends ours
  too, and tells a fork from the owner.
- A child whose parent is killed before it has said what to do ends with a traceback, and knows of nothing to clean up.
  Ours ends without a word, and removes the folder that it was told of on its command line.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import process, resource_tracker, spawn
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

# What a terminal or a service manager sends to the whole group. The owner decides what it means; its children ignore
# it from their first instruction on (their entry points lift the block), and end when the owner does.
GROUP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})

# What a child runs until it knows more; {run} is multiprocessing's own.
_PROGRAM = """
from multiprocessing.context import reduction
try:
    {run}
except (EOFError, reduction.pickle.UnpicklingError):
    import shutil, sys
    for folder in sys.argv[2:]:
        shutil.rmtree(folder, ignore_errors=True)
"""

_starting = threading.Lock()


class _Closable(Protocol):
    def close(self) -> None: ...


_not_for_forks: weakref.WeakSet[_Closable] = weakref.WeakSet()


def close_in_forks(lifeline: _Closable) -> None:
    """A fork of this process must not hold this end of a lifeline open: it tells of the end of this process alone."""
    _not_for_forks.add(lifeline)


def _close_lifelines() -> None:
    for lifeline in list(_not_for_forks):
        lifeline.close()


os.register_at_fork(after_in_child=_close_lifelines)


def start_process(
    name: str, target: Callable[[Any, Connection], None], argument: object, folder: str | None = None
) -> tuple[BaseProcess, Connection]:
    """Start `target(argument, lifeline)` in a fresh interpreter. Returns the process, and this side of the lifeline.

    The lifeline is a pipe: when the process at one end of it is gone, the other reads end-of-file. The caller sees to
    the child's end. folder: what the child removes if this process is killed before `target` can see to that.
    """
    with _starting, _standard_descriptors_taken():
        resource_tracker.ensure_running()  # else it starts with the first child, and lifts the block of signals
        ours, theirs = SpawnContext().Pipe(duplex=True)
        child = SpawnProcess(target=target, args=(argument, theirs), name=f"asyncscale-{name}")
        with _preparation(child.name, folder), _children_allowed(), _group_signals_blocked():
            child.start()
        theirs.close()  # else the child's end would stay open here, and its death would not close it
    close_in_forks(ours)
    process._children.discard(child)  # type: ignore[attr-defined]
    return child, ours


@contextmanager
def _standard_descriptors_taken() -> Iterator[None]:
    """In a process that was started without stdin, stdout or stderr, pipes would take their places."""
    taken: list[int] = []
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        taken.append(descriptor)
    os.close(descriptor)
    try:
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)


@contextmanager
def _group_signals_blocked() -> Iterator[None]:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _preparation(child_name: str, folder_to_remove: str | None) -> Iterator[None]:
    """Send the child what it needs; other threads may start processes of their own meanwhile, as ever."""
    prepare, command_line = spawn.get_preparation_data, spawn.get_command_line

    def without_main_and_folder(name: str) -> dict[str, Any]:
        if name != child_name:
            return prepare(name)
        folder = process.ORIGINAL_DIR or ""  # type: ignore[attr-defined]
        return {
            "name": name,
            "authkey": process.current_process().authkey,
            "sys_path": [entry or folder for entry in sys.path],
            "start_method": "spawn",
        }

    def quiet_and_safe(**arguments: Any) -> list[str]:
        *interpreter, run, mark = command_line(**arguments)
        executable, *flags = interpreter
        folders = [] if folder_to_remove is None else [folder_to_remove]
        # -P: until it has our sys.path, it looks for no module in the current folder.
        return [executable, "-P", *flags, _PROGRAM.format(run=run), mark, *folders]

    spawn.get_preparation_data, spawn.get_command_line = without_main_and_folder, quiet_and_safe
    try:
        yield
    finally:
        spawn.get_preparation_data, spawn.get_command_line = prepare, command_line


@contextmanager
def _children_allowed() -> Iterator[None]:
    config: dict[str, Any] = process.current_process()._config  # type: ignore[attr-defined]
    daemon = config.pop("daemon", None)
    try:
        yield
    finally:
        if daemon is not None:
            config["daemon"] = daemon
