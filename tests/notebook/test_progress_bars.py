"""Bars while engines load: widgets in a kernel, text where there are none, and nothing is left of either."""

from __future__ import annotations

import sys
from io import StringIO

import pytest
from jupyter_kernel import WIDGET, Kernel

from asyncscale.client.progress import StartProgress
from asyncscale.config import CheckpointFiles

MAKE = "client = await AsyncScaleClient(num_engines=2%s).start()"


@pytest.fixture(autouse=True)
def fetched(smollm2_files: CheckpointFiles) -> None:
    """The model: only real ones have something to load."""


def test_in_a_notebook_a_bar_is_a_widget_that_vanishes(kernel: Kernel) -> None:
    shown = kernel.run(MAKE % "")
    assert (shown.stdout, shown.stderr) == ("", "")
    assert shown.first_displays
    assert all(WIDGET in bundle for bundle in shown.first_displays)
    assert "loading 2 engines" in shown.first_displays[-1]["text/plain"]
    assert list(shown.displays.values()) == [{"text/plain": ""}]


def test_no_bar_where_none_is_wanted(kernel: Kernel) -> None:
    hidden = kernel.run(MAKE % ", progress=False")
    assert (hidden.stdout, hidden.stderr, hidden.displays) == ("", "", {})


FETCH = """
from asyncscale.client.progress import StartProgress
from asyncscale.notebook import progress_bar
progress_bar._TEXT_DELAY_S = %s
with StartProgress() as progress:
    progress.on_fetch("fetching", 1, 100)
    await asyncio.sleep(0.11)  # as long as tqdm rests between two pictures
    progress.on_fetch("fetching", 50, 100)
"""


def test_without_ipywidgets_what_takes_long_shows_text_and_nothing_warns(kernel: Kernel) -> None:
    kernel.run("import sys, ipywidgets as kept\nsys.modules['ipywidgets'] = None")
    try:
        short, long = kernel.run(FETCH % 60), kernel.run(FETCH % 0.01)
        assert (short.stdout, short.stderr, short.displays) == ("", "", {})
        assert "fetching:  50%" in long.stderr
        assert "Warning" not in long.stderr
        assert long.displays == {}
    finally:
        kernel.run("sys.modules['ipywidgets'] = kept")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_outside_of_notebooks_a_terminal_shows_text_and_nothing_else_does(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stderr)
    with StartProgress() as progress:
        progress.on_fetch("fetching", 10, 100)
        progress.on_loading(0, "weights", 0.5)
    text = stderr.getvalue()
    progress.on_fetch("fetching", 20, 100)  # in a thread that was not told of the end
    assert stderr.getvalue() == text
    assert ("fetching" in text, "loading 1 engine" in text) == (is_terminal, is_terminal)
