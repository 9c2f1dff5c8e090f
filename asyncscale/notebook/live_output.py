"""A widget in the outputs of cells, and what stays there when it has ended."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from asyncscale.notebook.cells import current_run


class LiveOutput:
    """HTML that changes in place, wherever it is shown.

    ::

        output = LiveOutput(text=lambda: "0 %")
        output.show(); output.draw("<b>1 %</b>"); output.end("<b>done</b>")

    text: the same for who sees no HTML. widget: an ipywidgets widget; its pictures go to no cell's output, and are not
    kept. With `end` each output becomes plain HTML, which a saved notebook shows without a kernel.
    Raises ImportError without ipywidgets.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        try:
            import ipywidgets
        except ImportError as error:
            needed = "a dashboard needs ipywidgets: pip install 'asyncscale[notebook]', and restart the kernel"
            raise ImportError(needed, name="ipywidgets") from error
        self.widget = ipywidgets.HTML()
        self._text = text
        self._handles: list[Any] = []
        self._shown_in: str | None = None  # the run of a cell
        self._ended = False

    def draw(self, html: str) -> None:
        """Show this from now on."""
        self.widget.value = html

    def show(self) -> None:
        """Below the running cell, but only once there; nowhere, outside of IPython."""
        run = current_run()
        if (run is not None and run.request == self._shown_in) or not _in_ipython():
            return
        self._shown_in = None if run is None else run.request
        view = {} if self._ended else self.widget._repr_mimebundle_()
        display: Any = import_module("IPython.display").display  # which has no types
        self._handles.append(display({**view, **self._plain()}, raw=True, display_id=True))

    def end(self, html: str) -> None:
        """Show this for good. Idempotent."""
        if not self._ended:
            self._ended = True
            self.draw(html)
            for handle in self._handles:
                handle.update(self._plain(), raw=True)
            self.widget.close()

    def _plain(self) -> dict[str, Any]:
        return {"text/html": self.widget.value, "text/plain": self._text()}


def _in_ipython() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None
