"""Starts engine processes by multiprocessing, less what it does for ordinary children and would harm an engine.

- The spawn method imports the parent's main module in the child, so that a script without an `if __name__ ==
"__main__"`
  guard starts itself over. An engine needs nothing of it.
- A daemonic process, such as a worker of a Pool, may not have children, lest they outlive it. An engine does not:
  its lifeline ends it.
- At the exit of a process, and of each of its forks, its children are joined or terminated. The lifeline ends an
  engine too, and tells a fork from the owner.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import process, spawn
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any

_starting = threading.Lock()


def start_process(name: str, target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start `target(*args)` in a fresh interpreter. The caller sees to its end."""
    child = SpawnProcess(target=target, args=args, name=f"asyncscale-{name}")
    with _starting, _main_left_out(child.name), _children_allowed():
        child.start()
    process._children.discard(child)  # type: ignore[attr-defined]
    return child


@contextmanager
def _main_left_out(child_name: str) -> Iterator[None]:
    # Other threads may start processes of their own meanwhile: only ours, known by its name, is changed.
    original = spawn.get_preparation_data

    def without_main(name: str) -> dict[str, Any]:
        data = original(name)
        if name == child_name:
            data.pop("init_main_from_name", None)
            data.pop("init_main_from_path", None)
        return data

    spawn.get_preparation_data = without_main
    try:
        yield
    finally:
        spawn.get_preparation_data = original


@contextmanager
def _children_allowed() -> Iterator[None]:
    config: dict[str, Any] = process.current_process()._config  # type: ignore[attr-defined]
    daemon = config.pop("daemon", None)
    try:
        yield
    finally:
        if daemon is not None:
            config["daemon"] = daemon


def make_lifeline() -> tuple[Any, Any]:
    """Two ends of a pipe: the owner's and the child's. When one process ends, the other reads end-of-file."""
    return multiprocessing.get_context("spawn").Pipe(duplex=True)
