"""Engines of a spread model meet over torch.distributed: gloo for what is on the CPU, nccl for what is on CUDA devices.

The process groups are made directly, not as torch's default group: nothing is left of one that its engine has left, and
the next can be made in the same process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asyncscale.progress import Progress
from asyncscale.tandem.collective_errors import CollectiveError
from asyncscale.tandem.meeting import Meeting

# An engine that is slow, or stopped for a while, is waited for. The end of one that dies is seen by its connections.
_OPERATION_TIMEOUT = timedelta(minutes=30)

# For connecting, when all are known to be there. gloo tries five times, and does not notice that the other end is gone.
_CONNECT_TIMEOUT = timedelta(seconds=5)

# Within a layer the others come that soon, unless one is stopped or has lost its core.
_YIELD_S = 0.002


class TorchGroup:
    """The `Collectives` of one engine, and the exchange of rows between all::

        group = TorchGroup(folder, engine_id=0, num_engines=2, progress=progress)
        group.join(generation)
        group.all_to_all(output, input, output_splits, input_splits)

    folder: where generations meet, see `tandem.meeting`. progress: rests while this engine waits for others.
    device: of the tensors that are exchanged.
    """

    def __init__(
        self,
        folder: str,
        engine_id: int,
        num_engines: int,
        progress: Progress | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.engine_id = engine_id
        self.num_engines = num_engines
        self._folder = folder
        self._progress = progress or Progress()
        self._device = torch.device(device)
        self._store: _MeetingStore | None = None  # nccl needs it until its first operation
        # No other name may hold them, not even a frame's: their connections close when the last is gone.
        # Any: torch's type stubs lack their operations.
        self._gloo: Any = None
        self._nccl: Any = None
        atexit.register(self.leave)  # the interpreter's end would find threads of gloo, and abort

    @property
    def joined(self) -> bool:
        """Whether this engine is in a generation; until then, it is alone."""
        return self._gloo is not None

    def join(self, generation: int) -> None:
        self.leave()
        meeting = Meeting(self._folder, generation)
        with self._waiting():
            meeting.put(f"engine/{self.engine_id}", b"")
            for engine_id in range(self.num_engines):
                meeting.get(f"engine/{engine_id}")
            self._store = _MeetingStore(meeting)
            self._gloo = dist.ProcessGroupGloo(self._store, self.engine_id, self.num_engines, _gloo_options())
            self._gloo._set_default_timeout(_OPERATION_TIMEOUT)
            if self._device.type == "cuda":
                self._nccl = dist.ProcessGroupNCCL(
                    self._store, self.engine_id, self.num_engines, dist.ProcessGroupNCCL.Options()
                )
                self._nccl._set_default_timeout(_OPERATION_TIMEOUT)
            self._gloo.barrier().wait()

    def leave(self) -> None:
        if self._nccl is not None:
            with contextlib.suppress(RuntimeError):
                self._nccl.abort()
        self._nccl = self._gloo = self._store = None

    def any(self, value: bool) -> bool:
        values = torch.tensor([value], dtype=torch.uint8)
        with self._waiting():
            _wait(_present(self._gloo).allreduce([values], dist.ReduceOp.MAX))
        return bool(values.item())

    def all_to_all(self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int]) -> None:
        """Give each engine its part of the rows of `input`, and take the parts for this one into `output`.

        Both are contiguous, on `device`, and of the same type and width. output_splits, input_splits: rows of each
        part, in the order of engines; zero is allowed. What one engine gives to another, that one must take.
        Raises CollectiveError when an engine is gone; what is in `output` then means nothing.
        """
        if not (output.is_contiguous() and input.is_contiguous()):
            raise ValueError("all_to_all needs contiguous tensors: call contiguous() on them first")
        if (sum(output_splits), sum(input_splits)) != (len(output), len(input)):
            raise ValueError(
                f"{len(output)} and {len(input)} rows are not what output_splits {output_splits} and input_splits "
                f"{input_splits} add up to"
            )
        with self._waiting():
            _wait(
                _present(self._nccl if self._device.type == "cuda" else self._gloo).alltoall_base(
                    output, input, output_splits, input_splits
                )
            )

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """For others: so this engine does not hang, and what torch then raises means that one of them is gone."""
        self._progress.rest()
        try:
            yield
        except RuntimeError as error:
            raise CollectiveError(f"another engine is gone, or has left the generation: {error}") from error
        finally:
            self._progress.work()


class _MeetingStore(dist.Store):  # type: ignore[name-defined,misc]  # not in its stubs, too
    """A meeting, as torch sees it: waiting ends with a CollectiveError when the meeting closes."""

    def __init__(self, meeting: Meeting) -> None:
        super().__init__()
        self._meeting = meeting

    def set(self, key: str, value: bytes) -> None:
        self._meeting.put(key, value)

    def get(self, key: str) -> bytes:
        return self._meeting.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self._meeting.get(key)

    def check(self, keys: list[str]) -> bool:
        return all(self._meeting.has(key) for key in keys)


def _gloo_options() -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # By default it asks for this host's name, which may not resolve. The engines of an owner are on one host.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = _CONNECT_TIMEOUT
    options._threads = 1  # one operation at a time
    return options


def _wait(work: Any) -> None:
    """Return when it is done; for the first moments without sleeping.

    A core that sleeps is slow to wake, and gloo's threads, which run on the core of the one that computes, may have to
    wait for the end of its time slice. To yield lets them run, and whoever else wants the core.
    """
    deadline = time.monotonic() + _YIELD_S
    try:
        while not work.is_completed() and time.monotonic() < deadline:
            os.sched_yield()
        work.wait()
    finally:
        del work  # it holds the group, and what it raises would hold this frame


def _present(group: Any) -> Any:
    if group is None:
        raise CollectiveError("this engine is in no generation")
    return group
