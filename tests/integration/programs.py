"""Whole programs for tests: written to the user's folder, started, signalled, looked after."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

PRELUDE = """
import asyncio, gc, os, signal, sys, threading, time
from asyncscale import *
FAST = SimulatedModel(base_ms=0.2)
async def three_tokens():
    async with AsyncScaleClient(FAST, num_engines=2) as client:
        completion = await client.generate("x", max_tokens=3, ignore_eos=True)
        sys.stdout.write(f"{len(completion.token_ids)}\\n")  # at once: print writes the end of the line by itself
        sys.stdout.flush()
"""


def processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.ppid() == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue  # children, such as multiprocessing's resource tracker, are looked after elsewhere
            if "resource_tracker" in " ".join(process.cmdline()):
                continue  # lives as long as anybody who forked from its starter
            if process.environ().get("TMPDIR") == str(folder):
                found.append(process)
    return found


def script(folder: Path, body: str, name: str = "script.py") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(PRELUDE + textwrap.dedent(body))
    return str(folder / name)


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=40, **options)  # type: ignore[call-overload,no-any-return]


def assert_prints(output: str, *arguments: str, **options: object) -> None:
    """The program ends well, prints just this, and nothing on stderr."""
    done = run(*arguments, **options)
    assert (done.stdout, done.stderr, done.returncode) == (output, "", 0)


def signalled(
    path: str,
    *arguments: str,
    line: str,
    sent: Sequence[signal.Signals],
    delay: float = 0.0,
    gap: float = 0.01,
    group: bool = True,
) -> tuple[int, str, str]:
    """Send signals to a program `delay` seconds after it printed `line`. Its exit code, stdout after that, stderr."""
    with subprocess.Popen(
        [sys.executable, path, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != line:
            assert process.poll() is None
        time.sleep(delay)
        for number in sent:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(process.pid, number)
            time.sleep(gap)
        stdout, stderr = process.communicate(timeout=15)
    return process.returncode, stdout, stderr
