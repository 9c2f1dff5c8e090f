"""A progress bar in a cell's output that leaves nothing there."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm

# A bar of text is shown only for what takes longer than this, in seconds: it leaves an empty line.
_TEXT_DELAY_S = 1.0


def notebook_bar(**arguments: Any) -> tqdm[NoReturn]:
    """A widget, or text where there is no ipywidgets. arguments: of `tqdm`."""
    try:
        import ipywidgets  # noqa: F401
    except ImportError:  # of which tqdm.auto would warn
        from tqdm import tqdm

        return tqdm(leave=False, delay=_TEXT_DELAY_S, **arguments)
    return _widget_class()(**arguments)


def _widget_class() -> type[tqdm[NoReturn]]:
    from tqdm import auto  # whose types know nothing of widgets

    display: Any = import_module("IPython.display").display

    class VanishingBar(auto.tqdm):  # type: ignore[type-arg]
        """A closed widget would be kept in the output, where a saved notebook looks for it in vain."""

        def __init__(self, **arguments: Any) -> None:
            self._handle: Any = None
            super().__init__(leave=False, display=False, **arguments)
            self._handle = display(self.container, display_id=True)  # type: ignore[attr-defined]

        def close(self) -> None:
            super().close()
            handle, self._handle = self._handle, None
            if handle is not None:
                handle.update({"text/plain": ""}, raw=True)

    return VanishingBar
