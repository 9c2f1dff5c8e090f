"""Starts engine processes by multiprocessing, without running the user's `__main__` again.

The spawn method imports the parent's main module in the child, so that a script without an `if __name__ ==
"__main__"` guard starts itself over. An engine needs nothing of it: the instruction to import it is taken out of what
the child is sent.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import spawn
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any

_NAME_PREFIX = "asyncscale-"


def start_process(name: str, target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start `target(*args)` in a fresh interpreter.

    The process is a daemon: it does not outlive a normal exit of this one.
    """
    process = _Process(target=target, args=args, name=_NAME_PREFIX + name, daemon=True)
    process.start()
    return process


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        with _main_left_out():
            return SpawnProcess._Popen(process_obj)


@contextmanager
def _main_left_out() -> Iterator[None]:
    # Other threads may start processes of their own meanwhile: only ours, known by name, are changed.
    original = spawn.get_preparation_data

    def without_main(name: str) -> dict[str, Any]:
        data = original(name)
        if name.startswith(_NAME_PREFIX):
            data.pop("init_main_from_name", None)
            data.pop("init_main_from_path", None)
        return data

    spawn.get_preparation_data = without_main
    try:
        yield
    finally:
        spawn.get_preparation_data = original


def make_lifeline() -> tuple[Any, Any]:
    """Two ends of a pipe: the owner's and the child's. When one process ends, the other reads end-of-file."""
    return multiprocessing.get_context("spawn").Pipe(duplex=True)
