"""The pages of the documentation, and how their code is run.

Blocks of one page run in order in one namespace, as cells of a notebook do: ``await`` may stand outside of functions.
One that calls ``asyncio.run`` runs as a script does. A ``python`` block whose first line is a comment with nothing but
a file's name (``# app.py``) is saved as that file instead. ``sh`` blocks run line by line where those files are.
Whatever else a page holds (``text``, ``console``, ``json``) is not code.
"""

from __future__ import annotations

import ast
import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import uvloop
from sybil.document import Document
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser

from asyncscale import AsyncScaleClient

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "asyncscale" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

_FILE_NAME = re.compile(r"# (\w+\.py)\n")
_SHELL_TIMEOUT_S = 60


def run_page(page: Path) -> int:
    """Run a page's code in the current folder, and return how many blocks it has. Tracebacks name the page's lines."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        document = _parse(page, runner)
        document.namespace["__name__"] = "__main__"
        examples = list(document)
        try:
            for example in examples:
                example.evaluate()
        except BaseException:
            runner.run(_close_clients(document.namespace))  # else what is left running hides why
            raise
    return len(examples)


def save_files(page: Path, folder: Path) -> None:
    """Save the files that a page shows, and run nothing."""
    for example in _parse(page, None):
        _save(str(example.parsed), folder)


def program_environment() -> dict[str, str]:
    """For programs of the pages: they find this interpreter and the library, installed or not."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


def shell_lines(page: Path) -> list[str]:
    """The lines of a page's ``sh`` blocks."""
    document = Document.parse(str(page), CodeBlockParser("sh", _run_shell))
    return [line for example in document for line in str(example.parsed).splitlines()]


def _parse(page: Path, runner: asyncio.Runner | None) -> Document:
    def run_python(example: Example) -> None:
        if runner is not None and not _save(str(example.parsed), Path.cwd()):
            _run_python(example, runner)

    return Document.parse(str(page), CodeBlockParser("python", run_python), CodeBlockParser("sh", _run_shell))


def _run_python(example: Example, runner: asyncio.Runner) -> None:
    first_line = example.line + example.parsed.line_offset
    source = "\n" * first_line + example.parsed
    code = compile(source, example.path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if "asyncio.run(" in source:
        exec(code, example.namespace)  # a whole script, which has a loop of its own
        return

    async def run() -> None:
        if (rest := eval(code, example.namespace)) is not None:
            await rest

    runner.run(run())


async def _close_clients(namespace: dict[str, object]) -> None:
    for value in list(namespace.values()):
        if isinstance(value, AsyncScaleClient):
            await value.close(drain=False)


def _run_shell(example: Example) -> None:
    for line in example.parsed.splitlines():
        if line.startswith("pip "):
            continue  # .ci/run does these
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=_SHELL_TIMEOUT_S, env=program_environment()
        )
        assert done.returncode == 0, f"{example.path}:{example.line}: {line}\n{done.stdout}{done.stderr}"


def _save(source: str, folder: Path) -> bool:
    name = _FILE_NAME.match(source)
    if name is not None:
        (folder / name[1]).write_text(source)
    return name is not None
