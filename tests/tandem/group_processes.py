"""Processes that meet in a `TorchGroup` or a `LockstepGroup`, and do what they are told over a pipe."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal

from asyncscale.progress import Progress, look, make_file
from asyncscale.tandem.collective_errors import CollectiveError

if TYPE_CHECKING:
    from asyncscale.tandem.lockstep import LockstepGroup
    from asyncscale.tandem.torch_group import TorchGroup

WAIT_S = 60.0

Kind = Literal["torch", "lockstep"]


class Engine:
    """One such process; `tell` what to do, then `hear` what came of it."""

    def __init__(self, kind: Kind, folder: str, engine_id: int, num_engines: int) -> None:
        self._pipe, there = multiprocessing.Pipe()
        self._progress_path = f"{folder}/{secrets.token_hex(4)}.progress"
        make_file(self._progress_path)
        self.process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(there, kind, folder, engine_id, num_engines, self._progress_path)
        )
        self.process.start()
        there.close()

    def tell(self, method: str, *args: Any) -> None:
        self._pipe.send((method, args))

    def hear(self) -> Any:
        """The result, or the CollectiveError as a string that begins with its name."""
        assert self._pipe.poll(WAIT_S)
        return self._pipe.recv()

    @property
    def rests(self) -> bool:
        """Whether it shows that it waits for others."""
        sight = look(self._progress_path)
        assert sight is not None
        return sight.resting

    def wait_until_it_rests(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self.rests:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """The process ends as a Python program does, and must do so well."""
        self._pipe.close()
        self.process.join(WAIT_S)
        assert self.process.exitcode in (0, -signal.SIGKILL)
        self.process.close()


def _serve(pipe: Connection, kind: Kind, folder: str, engine_id: int, num_engines: int, progress_path: str) -> None:
    worker = (_TorchWorker if kind == "torch" else _LockstepWorker)(
        folder, engine_id, num_engines, Progress(progress_path)
    )
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(worker, method)(*args))
        except CollectiveError as error:
            pipe.send(f"CollectiveError: {error}")


class _Worker:
    group: TorchGroup | LockstepGroup

    def join(self, generation: int) -> None:
        self.group.join(generation)

    def leave(self) -> None:
        self.group.leave()

    def any(self, value: bool) -> bool:
        return self.group.any(value)


class _LockstepWorker(_Worker):
    def __init__(self, folder: str, engine_id: int, num_engines: int, progress: Progress) -> None:
        from asyncscale.tandem.lockstep import LockstepGroup

        self.group = LockstepGroup(folder, engine_id, num_engines, progress)

    def step(self) -> None:
        self.group.step()


class _TorchWorker(_Worker):
    def __init__(self, folder: str, engine_id: int, num_engines: int, progress: Progress) -> None:
        import torch

        from asyncscale.tandem.torch_group import TorchGroup

        torch.set_num_threads(1)
        self._torch = torch
        self.group = TorchGroup(folder, engine_id, num_engines, progress)

    def exchange(self, dtype: str, lengths: list[list[int]]) -> list[list[list[float]]]:
        """lengths[i][j]: rows from engine i to j, which hold i, j and their number. Returns what came, by engine."""
        here, torch = self.group.engine_id, self._torch
        sent = [[here, to, k] for to, length in enumerate(lengths[here]) for k in range(length)]
        taken = [length[here] for length in lengths]
        kind = getattr(torch, dtype)
        output = torch.empty(sum(taken), 3, dtype=kind)
        self.group.all_to_all(output, torch.tensor(sent, dtype=kind).view(-1, 3), taken, lengths[here])
        return [part.tolist() for part in output.split(taken)]

    def open_things(self) -> tuple[int, int]:
        """Descriptors and threads of this process."""
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
