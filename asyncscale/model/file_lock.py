"""Files as locks (flock) between processes and threads. The system frees them when their holder ends, in any way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_LOOK_INTERVAL_S = 0.01


@contextlib.contextmanager
def exclusive_file(path: Path) -> Iterator[int]:
    """A descriptor of a file that nobody else has meanwhile; may hold remains of a killed process's work.

    Made where it is missing, removed afterwards unless it was renamed. The lock lasts as long as any duplicate of the
    descriptor, that of a mapping for example.
    """
    descriptor = _locked(path)
    try:
        yield descriptor
    finally:
        if _is_at(descriptor, path):
            path.unlink()
        os.close(descriptor)


def remove_unless_used(path: Path) -> bool:
    """Removes a file on which nobody holds a lock. Whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS locks exclusively only what is open for writing
    except OSError:
        return not path.exists()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            path.unlink()
    except OSError:  # it is locked, or somebody else's
        return False
    finally:
        os.close(descriptor)
    return True


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # Asked for again and again: who renames the file may keep a lock on it for as long as it is used.
            while _is_at(descriptor, path):
                if _try_lock(descriptor) and _is_at(descriptor, path):
                    return descriptor
                time.sleep(_LOOK_INTERVAL_S)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
