"""`python -m asyncscale`, as a person or a shell script runs it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from asyncscale.config import CheckpointFiles

COMMAND = [sys.executable, "-m", "asyncscale"]
SUMMARY = re.compile(
    r"engines used: (\d) of (\d) \(([\d, ]+)\) \| (\d+) tokens \| TTFT \d+ ms( \(median\))? \| [\d.]+ tokens/s"
)

pytestmark = pytest.mark.usefixtures("smollm2_files")  # fetched outside of what is measured here


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)


def test_an_answer_streams_after_a_progress_bar_and_before_a_line_of_figures() -> None:
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    arguments = ["The capital of France is", "--num-engines", "1", "--max-tokens", "40"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        assert process.stdout is not None
        chunks = []
        while chunk := os.read(process.stdout.fileno(), 65536):
            chunks.append(chunk)
        bar = b""
        with contextlib.suppress(OSError):  # the terminal's end; one read returns 4 KB at most
            while chunk := os.read(terminal, 65536):
                bar += chunk
        os.close(terminal)
    assert process.returncode == 0
    assert b"loading 1 engine: " in bar
    assert bar.rsplit(b"\r", 1)[-1].strip() == b""  # it is gone when the answer comes
    assert len(chunks) > 2  # it streams; on a busy machine several tokens come in one read
    answer, summary = b"".join(chunks).decode().rstrip("\n").rsplit("\n", 1)
    assert answer.startswith(" Paris")
    match = SUMMARY.fullmatch(summary)
    assert match is not None
    assert match.group(1, 2, 3, 5) == ("1", "1", "0", None)
    assert 10 < int(match[4]) <= 40


def test_several_chats_stream_to_labelled_lines_over_two_engines() -> None:
    done = run("--chat", "Say hi.", "Name a colour.", "--num-engines", "2", "--max-tokens", "12")
    *lines, summary = done.stdout.splitlines()
    assert (done.stderr, done.returncode) == ("", 0)
    assert {line[:4] for line in lines} == {"[1] ", "[2] "}
    match = SUMMARY.fullmatch(summary)
    assert match is not None
    assert match.group(1, 2, 3, 5) == ("2", "2", "0, 1", " (median)")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-such-model", "hi"], "no model 'no-such-model'"),
        (["--model", "/nonexistent", "hi"], "the model path /nonexistent does not exist"),
        (["--num-engines", "0", "hi"], "num_engines"),
        (["--num-engines", "1", ""], "empty"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr.startswith("asyncscale: error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--num-engines", "two", "hi"], ["--unknown", "hi"]])
def test_a_wrong_command_line_shows_the_usage(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.stdout, done.returncode) == ("", 2)
    assert done.stderr.startswith("usage: python -m asyncscale")


@pytest.mark.parametrize("when", ["loading", "streaming"])
def test_ctrl_c_ends_it_quietly(when: str, smollm2_files: CheckpointFiles, runtime_folders: Path) -> None:
    arguments = ["hi", "--num-engines", "1", "--max-tokens", "1000", "--model", smollm2_files.path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*COMMAND, *arguments], start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        if when == "streaming":
            process.stdout.read(3)
        else:
            deadline = time.monotonic() + 20
            while not list(runtime_folders.glob("asyncscale-*/*.stderr")):  # made by an engine that begins to load
                assert time.monotonic() < deadline
                time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (errors, process.returncode) == (b"", 130)


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    arguments = ["hi", "--num-engines", "1", "--max-tokens", "200"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(3)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode != 0
