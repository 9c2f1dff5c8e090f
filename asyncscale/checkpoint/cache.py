"""The cache folder: files known by their SHA-256, written atomically, one fetch at a time over all processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from asyncscale.errors import ModelLoadError

_TEMPORARY_PREFIX = ".fetch-"


class PinnedFile(msgspec.Struct, frozen=True):
    """A file that can only be this one. size: in bytes. sha256: lowercase hex."""

    name: str
    size: int
    sha256: str

    def matches(self, path: Path) -> bool:
        """Whether `path` has this content (all of it is read)."""
        return path.is_file() and path.stat().st_size == self.size and sha256_of(path) == self.sha256


class _Stamp(msgspec.Struct, frozen=True):
    """Beside a cached file: which content was verified, and the file's size and time then."""

    sha256: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, pinned: PinnedFile, path: Path) -> _Stamp:
        stat = path.stat()
        return cls(pinned.sha256, stat.st_size, stat.st_mtime_ns)


def cache_folder() -> Path:
    """`ASYNCSCALE_CACHE`, else the platform's place for caches. It need not exist."""
    if folder := os.environ.get("ASYNCSCALE_CACHE"):
        return Path(folder).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "asyncscale"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asyncscale"


def cached(pinned: PinnedFile, fetch: Callable[[Path], Path]) -> Path:
    """The path of `pinned` in the cache folder; where it is not there, `fetch` gets it.

    fetch: is given an empty temporary folder, and returns the path of the file that it made in it.
    Where the file is, and has the size and time that it had when it was verified, it is not read again.
    Raises ModelLoadError when the folder cannot be used or what was fetched is another file.
    """
    folder = cache_folder() / "models" / pinned.sha256[:16]
    path = folder / pinned.name
    if _is_verified(pinned, path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder / ".lock"):
            for leftover in folder.glob(_TEMPORARY_PREFIX + "*"):  # of a fetch that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            if not _is_verified(pinned, path):
                if not pinned.matches(path):
                    _fetch_into(folder, pinned, fetch)
                _stamp_path(path).write_bytes(msgspec.json.encode(_Stamp.of(pinned, path)))
    except OSError as error:
        raise ModelLoadError(
            f"cannot use the cache folder {folder}: {error}. "
            "Set the environment variable ASYNCSCALE_CACHE to a folder that can be written"
        ) from error
    return path


def sha256_of(path: Path) -> str:
    """Lowercase hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _is_verified(pinned: PinnedFile, path: Path) -> bool:
    try:
        stamp = msgspec.json.decode(_stamp_path(path).read_bytes(), type=_Stamp)
        return stamp == _Stamp.of(pinned, path) and stamp.size == pinned.size
    except (OSError, msgspec.DecodeError):
        return False


def _fetch_into(folder: Path, pinned: PinnedFile, fetch: Callable[[Path], Path]) -> None:
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=folder) as temporary:
        fetched = fetch(Path(temporary))
        if not pinned.matches(fetched):
            raise ModelLoadError(
                f"what was fetched as {pinned.name} is another file: {fetched.stat().st_size} bytes with SHA-256 "
                f"{sha256_of(fetched)}, expected are {pinned.size} with {pinned.sha256}"
            )
        with fetched.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(fetched, folder / pinned.name)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Only one process, and one thread of it, is inside at a time; a killed one is outside."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
