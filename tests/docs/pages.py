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


class OpenPage:
    """A page's code, to be run block by block in an event loop that is closed with it."""

    def __init__(self, page: Path) -> None:
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        document = Document.parse(
            str(page), CodeBlockParser("python", self._run_python), CodeBlockParser("sh", _run_shell)
        )
        self.namespace = document.namespace
        self.namespace["__name__"] = "__main__"
        self.blocks = list(document)

    def __enter__(self) -> OpenPage:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.runner.run(_close_clients(self.namespace))  # else what is left running hides why
        self.runner.close()

    def _run_python(self, block: Example) -> None:
        """Tracebacks name the page's lines."""
        if _save(block.parsed, Path.cwd()):
            return
        source = "\n" * (block.line + block.parsed.line_offset) + block.parsed
        code = compile(source, block.path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        if "asyncio.run(" in source:
            exec(code, block.namespace)  # a whole script, which has a loop of its own
            return

        async def run() -> None:
            if (rest := eval(code, block.namespace)) is not None:
                await rest

        self.runner.run(run())


def run_page(page: Path) -> None:
    """Run a page's code in the current folder."""
    with OpenPage(page) as opened:
        for block in opened.blocks:
            block.evaluate()


def save_files(page: Path, folder: Path) -> None:
    """Save the files that a page shows, and run nothing."""
    for block in blocks(page, "python"):
        _save(block, folder)


def blocks(page: Path, language: str) -> list[str]:
    return [block.parsed for block in Document.parse(str(page), CodeBlockParser(language, _run_shell))]


def program_environment() -> dict[str, str]:
    """For programs of the pages: they find this interpreter, the library and its pytest plugin, installed or not."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PYTEST_PLUGINS": "asyncscale.testing"}


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
