"""The API reference is what the docstrings say, and their examples run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_reference import PAGE, render
from pages import OpenPage

import asyncscale
import asyncscale.blocking

MODEL = asyncscale.SimulatedModel()


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "PYTHONPATH=. python tests/docs/api_reference.py writes it anew"


def test_the_examples_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    Path("step-100.safetensors").write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")  # holds no tensor
    text = PAGE.read_text().splitlines()
    with (
        OpenPage(PAGE) as page,
        closing_in(page.runner, page.runner.run(start())) as client,
        asyncscale.blocking.AsyncScaleClient(MODEL, num_engines=2) as blocking,
    ):
        histogram = client.metrics().requests.time_to_first_token_seconds
        names = {"prompt": "Hello", "prompts": ["One", "Two"], "address": client.address, "model": MODEL}
        names |= {"histogram": histogram, "earlier": histogram, "later": histogram}
        for block in page.blocks:
            section = [line for line in text[: block.line] if line.startswith("## ")][-1].removeprefix("## ")
            page.namespace.clear()
            page.namespace |= {"__name__": "__main__"} | names_of_users(section) | names | {"client": client}
            if section == "asyncscale.blocking":
                generations = [blocking.generate(prompt) for prompt in ("One", "Two")]
                page.namespace |= {"client": blocking, "generations": generations, "generation": generations[0]}
            block.evaluate()
        assert len(page.blocks) > 15


@contextlib.contextmanager
def closing_in(runner: asyncio.Runner, client: asyncscale.AsyncScaleClient) -> Iterator[asyncscale.AsyncScaleClient]:
    try:
        yield client
    finally:
        runner.run(client.close(drain=False))


async def start() -> asyncscale.AsyncScaleClient:
    return await asyncscale.AsyncScaleClient(MODEL, num_engines=2).start()


def names_of_users(module: str) -> dict[str, Any]:
    """What who reads an example has imported."""
    names: dict[str, Any] = {}
    exec(f"import asyncio, concurrent.futures\nfrom asyncscale import *\nfrom {module} import *", names)
    return names
