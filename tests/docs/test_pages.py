"""What the README and the documentation show is code that runs."""

from __future__ import annotations

import configparser
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_reference import PAGE as API_REFERENCE
from pages import DOCS, PAGES, ROOT, blocks, run_page


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("asyncscale")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != API_REFERENCE], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_code_of_a_page_runs(page: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    run_page(page)


def test_pip_commands_of_the_readme_are_run_by_ci() -> None:
    lines = "".join(blocks(ROOT / "README.md", "sh")).splitlines()
    commands = [line for line in lines if line.startswith("pip ")]
    assert len(commands) == 2
    assert set(commands) <= set((ROOT / ".ci" / "run").read_text().splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_files_that_the_design_names_are_there() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|/))`", (DOCS / "design.md").read_text())
    assert len(named) > 20
    assert [name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "asyncscale"))] == []


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings, and those that are written out."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return {*slugs, *re.findall(r'<a id="([\w-]+)">', text)}


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    missing = [page.name for page in DOCS.rglob("*.md") if f"({page.relative_to(DOCS)})" not in index]
    assert missing == ["index.md"], f"add them to {DOCS / 'index.md'}"


def test_every_page_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["asyncscale"].split()
    installed = {path for pattern in patterns for path in (ROOT / "asyncscale").glob(pattern)}
    assert installed >= set(DOCS.rglob("*.md"))
