"""The API reference is what the docstrings say, and their examples run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_reference import PAGE, render
from pages import OpenPage

import asyncscale
import asyncscale.blocking

MODEL = asyncscale.SimulatedModel()


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "python tests/docs/api_reference.py writes it anew"


def test_the_examples_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    text = PAGE.read_text().splitlines()
    with OpenPage(PAGE) as page, asyncscale.blocking.AsyncScaleClient(MODEL, num_engines=2) as blocking:
        client = page.runner.run(start())
        names = {"prompt": "Hello", "prompts": ["One", "Two"], "address": client.address, "model": MODEL}
        for block in page.blocks:
            section = [line for line in text[: block.line] if line.startswith("## ")][-1]
            page.namespace.clear()
            page.namespace |= {"__name__": "__main__", **vars_of_users(), **names, "client": client}
            if section == "## asyncscale.blocking":
                generations = [blocking.generate(prompt) for prompt in names["prompts"]]
                page.namespace |= {**vars(asyncscale.blocking), "client": blocking, "generations": generations}
            block.evaluate()
        assert len(page.blocks) > 15
        page.runner.run(client.close())


async def start() -> asyncscale.AsyncScaleClient:
    return await asyncscale.AsyncScaleClient(MODEL, num_engines=2).start()


def vars_of_users() -> dict[str, Any]:
    """What who reads an example has imported."""
    names: dict[str, Any] = {}
    exec("import asyncio, concurrent.futures\nfrom asyncscale import *", names)
    return names
