"""What is in a checkpoint's files, as one SHA-256; files that have not changed are not read again.

Hashing runs at 2 GB/s at best. So of each file that was hashed, a small file in the cache remembers device, inode,
size, times and SHA-256. The clock of a file system is coarse: a file that is changed twice within its resolution looks
the same. Therefore a file that was changed less than two seconds before it was hashed is not remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from asyncscale.checkpoint.cache import sha256_of
from asyncscale.errors import ModelLoadError

_RACY_NS = 2_000_000_000
_MOST_REMEMBERED = 256


class _Identity(msgspec.Struct, frozen=True):
    """As long as this stays the same, so does the file's content. Times in nanoseconds."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> _Identity:
        stat = path.stat()
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def is_settled(self, now_ns: int) -> bool:
        return max(self.mtime_ns, self.ctime_ns) < now_ns - _RACY_NS


class _Remembered(msgspec.Struct, frozen=True):
    identity: _Identity
    sha256: str


class ContentDigest:
    """The SHA-256 of some files' names and contents::

        digest = ContentDigest(paths, folder)
        digest.sha256
        digest.check_unchanged()        # after they were read for whatever the digest was needed for

    folder: where digests are remembered, if that is possible. Raises ModelLoadError where a file cannot be read, or
    changes meanwhile.
    """

    sha256: str

    def __init__(self, paths: Sequence[Path], folder: Path) -> None:
        self._files = [(path, *_digest(path, folder)) for path in paths]
        listing = [(path.name, sha256) for path, _, sha256 in self._files]
        self.sha256 = hashlib.sha256(msgspec.json.encode(listing)).hexdigest()

    def check_unchanged(self) -> None:
        """Raises ModelLoadError when a file is not the one any more that was hashed."""
        for path, identity, _ in self._files:
            if _identity(path) != identity:
                raise ModelLoadError(f"{path} was changed while it was read; start again")


def _identity(path: Path) -> _Identity:
    try:
        return _Identity.of(path)
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error


def _digest(path: Path, folder: Path) -> tuple[_Identity, str]:
    identity = _identity(path)
    memory = folder / f"{identity.device:x}-{identity.inode:x}.json"
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        remembered = msgspec.json.decode(memory.read_bytes(), type=_Remembered)
        if remembered.identity == identity:
            return identity, remembered.sha256
    now = time.time_ns()
    try:
        sha256 = sha256_of(path)
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error
    if _identity(path) != identity:
        raise ModelLoadError(f"{path} was changed while it was read; start again")
    if identity.is_settled(now):
        with contextlib.suppress(OSError):
            _remember(memory, _Remembered(identity, sha256))
    return identity, sha256


def _remember(memory: Path, remembered: _Remembered) -> None:
    memory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=memory.parent, suffix=".new", delete=False) as file:
        file.write(msgspec.json.encode(remembered))
    os.replace(file.name, memory)
    entries = sorted(memory.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in entries[:-_MOST_REMEMBERED]:
        old.unlink(missing_ok=True)
