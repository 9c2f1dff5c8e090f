"""How far an engine is, in a small file beside its socket: an engine that hangs can say nothing, and this is seen.

The engine maps the file and writes to memory; whoever wants to know reads the file. Four 64-bit numbers: ticks, which
grow with every sign of work; resting, 1 while the engine waits for messages; and when the last step began and when one
last ended, in nanoseconds of the monotonic clock, which all processes of a host share (0: never).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from dataclasses import dataclass

_FORMAT = struct.Struct("=4Q")
_CELL_BYTES = 8
_TICKS, _RESTING, _STEP_BEGAN, _STEP_ENDED = range(4)


@dataclass(frozen=True, slots=True)
class Sight:
    """What was to be seen of an engine's progress at one moment. Times are seconds of the monotonic clock."""

    ticks: int
    resting: bool
    step_began: float | None
    step_ended: float | None


class Progress:
    """The engine's side::

        progress = Progress(path)      # the file is made by who starts the engine, with `make_file`
        progress.work()
        progress.begin_step()
        progress.tick()                # again and again
        progress.end_step()
        progress.rest()

    Each call costs a store to memory. Without a path, nobody sees it.
    """

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            memory = mmap.mmap(-1, _FORMAT.size)
        else:
            with open(path, "r+b") as file:
                memory = mmap.mmap(file.fileno(), _FORMAT.size)
        self._cells = memoryview(memory).cast("Q")
        # For native code, which counts on its own. Keeps the mapping alive.
        self._native_ticks = ctypes.c_uint64.from_buffer(memory, _TICKS * _CELL_BYTES)

    @property
    def ticks_address(self) -> int:
        """Where the ticks are: a native 64-bit number that may be counted up instead of calling `tick`."""
        return ctypes.addressof(self._native_ticks)

    def work(self) -> None:
        """There is something to do."""
        self._cells[_RESTING] = 0
        self.tick()

    def rest(self) -> None:
        """From now on, wait for messages."""
        self._cells[_RESTING] = 1

    def tick(self) -> None:
        """Something was done."""
        self._cells[_TICKS] += 1

    def begin_step(self) -> None:
        """A step begins, with all that was received so far."""
        self._cells[_STEP_BEGAN] = time.monotonic_ns()
        self.tick()

    def end_step(self) -> None:
        """A step is complete."""
        self._cells[_STEP_ENDED] = time.monotonic_ns()
        self.tick()


def make_file(path: str) -> None:
    """For an engine that is started next: it rests until it says something else."""
    with open(path, "xb") as file:
        file.write(_FORMAT.pack(0, 1, 0, 0))


def look(path: str) -> Sight | None:
    """What the engine shows now; None when there is no such file."""
    try:
        ticks, resting, step_began, step_ended = _FORMAT.unpack(read_small_file(path))
    except (OSError, ValueError, struct.error):  # ValueError: no path at all
        return None
    return Sight(ticks, bool(resting), _seconds(step_began), _seconds(step_ended))


def read_small_file(path: str) -> bytes:
    """What is in it, up to a kilobyte, without the layers of `open`: this is done every second, by idle clients too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, 1024, 0)
    finally:
        os.close(descriptor)


def _seconds(nanoseconds: int) -> float | None:
    return nanoseconds / 1e9 if nanoseconds else None
