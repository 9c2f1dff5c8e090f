from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asyncscale.checkpoint.cache import PinnedFile, cache_folder, cached
from asyncscale.errors import ModelLoadError

CONTENT = b"weights" * 1000
PINNED = PinnedFile("model.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASYNCSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Fetches:
    """Writes `content`, and counts how often it was asked to."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.count = 0
        self._content = content

    def __call__(self, folder: Path) -> Path:
        self.count += 1
        path = folder / "fetched"
        path.write_bytes(self._content)
        return path


def refuse(folder: Path) -> Path:
    raise AssertionError("fetched again")


def test_a_file_is_fetched_once() -> None:
    fetch = Fetches()
    path = cached(PINNED, fetch)
    assert path.read_bytes() == CONTENT
    assert cached(PINNED, refuse) == path
    assert fetch.count == 1


def test_nothing_but_the_file_its_stamp_and_the_lock_is_left() -> None:
    path = cached(PINNED, Fetches())
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".lock", "model.gguf", "model.gguf.verified"]


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT + b"x", b"W" + CONTENT[1:], b""])
def test_a_damaged_file_is_fetched_again(damaged: bytes) -> None:
    path = cached(PINNED, Fetches())
    path.write_bytes(damaged)
    os.utime(path, ns=(0, 0))  # whatever the resolution of the file system's clock
    fetch = Fetches()
    assert cached(PINNED, fetch).read_bytes() == CONTENT
    assert fetch.count == 1


def test_without_its_stamp_a_file_is_verified_and_not_fetched() -> None:
    path = cached(PINNED, Fetches())
    path.with_name("model.gguf.verified").write_text("{")
    assert cached(PINNED, refuse) == path
    assert cached(PINNED, refuse) == path


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(cache: Path) -> None:
    with pytest.raises(ModelLoadError, match="is another file: 5 bytes"):
        cached(PINNED, Fetches(b"other"))
    assert not list(cache.rglob("model.gguf"))
    assert cached(PINNED, Fetches()).read_bytes() == CONTENT


def test_leftovers_of_a_killed_fetch_are_removed(cache: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from asyncscale.checkpoint.cache import PinnedFile, cached\n"
        "def die(folder):\n"
        "    (folder / 'half').write_bytes(b'x' * 100)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"cached(PinnedFile({PINNED.name!r}, {PINNED.size}, {PINNED.sha256!r}), die)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert list(cache.rglob("half"))
    assert cached(PINNED, Fetches()).read_bytes() == CONTENT
    assert not list(cache.rglob("half"))


def test_nobody_else_can_fetch_meanwhile() -> None:
    def fetch(folder: Path) -> Path:
        with (folder.parent / ".lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Fetches()(folder)

    cached(PINNED, fetch)


def test_several_processes_fetch_it_once(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from asyncscale.checkpoint.cache import PinnedFile, cached\n"
        "def fetch(folder):\n"
        f"    with open({str(tmp_path / 'log')!r}, 'a') as log: log.write('fetched\\n')\n"
        "    (folder / 'f').write_bytes(b'weights' * 1000)\n"
        "    return folder / 'f'\n"
        "sys.stdin.read(1)\n"
        f"print(cached(PinnedFile({PINNED.name!r}, {PINNED.size}, {PINNED.sha256!r}), fetch))\n"
    )
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdin
        process.stdin.write("g")
        process.stdin.flush()
    outputs = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(outputs) == 1
    assert (tmp_path / "log").read_text() == "fetched\n"


def test_a_folder_that_cannot_be_used_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASYNCSCALE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match=r"cannot use the cache folder .*file.*ASYNCSCALE_CACHE"):
        cached(PINNED, Fetches())


@pytest.mark.parametrize(
    ("platform", "expected"), [("linux", "xdg/asyncscale"), ("darwin", "home/Library/Caches/asyncscale")]
)
def test_without_the_variable_the_platforms_folder_is_used(
    platform: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASYNCSCALE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == tmp_path / expected
