"""Files as locks (flock) between processes and threads. The system frees them when their holder ends, in any way."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


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
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):  # and was not renamed or removed by the lock's last holder
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
