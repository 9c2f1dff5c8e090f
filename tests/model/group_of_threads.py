"""Engines of a group as threads of one process: their exchange of rows, without processes and sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from asyncscale.tandem.core import CollectiveError

T = TypeVar("T")


class GroupOfThreads:
    """::

        group = GroupOfThreads(num_engines=2)
        results = group.run(lambda member: compute(member))     # in a thread for each member, all at once

    An exception in one of them ends the waits of the others with a CollectiveError; `run` raises the former.
    """

    def __init__(self, num_engines: int, timeout: float = 30.0) -> None:
        self._barrier = threading.Barrier(num_engines, timeout=timeout)
        self._inputs: list[list[Tensor]] = [[] for _ in range(num_engines)]  # of each, the parts for each
        self.members = [Member(self, engine_id) for engine_id in range(num_engines)]

    def run(self, work: Callable[[Member], T]) -> list[T]:
        """What `work` returns of each member."""
        return self.run_each([work] * len(self.members))

    def run_each(self, works: Sequence[Callable[[Member], T]]) -> list[T]:
        """The same, with work of its own for each member."""
        with ThreadPoolExecutor(len(self.members)) as threads:
            tasks = [threads.submit(self._run, work, member) for work, member in zip(works, self.members, strict=True)]
        errors = [error for task in tasks if (error := task.exception()) is not None]
        if errors:
            self._barrier.reset()
            raise next((error for error in errors if not isinstance(error, CollectiveError)), errors[0])
        return [task.result() for task in tasks]

    def _run(self, work: Callable[[Member], T], member: Member) -> T:
        try:
            return work(member)
        except BaseException:
            self._barrier.abort()
            raise

    def exchange(self, engine_id: int, parts: list[Tensor]) -> list[Tensor]:
        """What all have for this one."""
        self._inputs[engine_id] = parts
        self._wait()
        received = [parts[engine_id].clone() for parts in self._inputs]
        self._wait()  # nobody overwrites what another still reads
        return received

    def _wait(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise CollectiveError("another engine is gone") from None


class Member:
    """One engine's side. before_exchange: is called before every all_to_all with its number, from 0; may raise."""

    def __init__(self, group: GroupOfThreads, engine_id: int) -> None:
        self._group = group
        self.engine_id = engine_id
        self.num_engines = len(group._inputs)
        self.joined = True
        self.num_exchanges = 0
        self.before_exchange: Callable[[int], Any] = lambda number: None

    def all_to_all(self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int]) -> None:
        number, self.num_exchanges = self.num_exchanges, self.num_exchanges + 1
        self.before_exchange(number)
        assert input.is_contiguous()
        assert output.is_contiguous()
        assert len(output_splits) == len(input_splits) == self.num_engines
        received = self._group.exchange(self.engine_id, list(torch.split(input, input_splits)))
        assert [len(part) for part in received] == output_splits
        output.copy_(torch.cat(received))
