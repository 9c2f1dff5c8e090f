"""Progress bars while a model is fetched and engines load: widgets in a notebook, text on a terminal, else nothing."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm

# Share of an engine's start that each phase takes, about; phases not named here count as the rest.
_PHASE_START = {"import": 0.0, "weights": 0.4, "warm-up": 0.9}
_PHASE_SHARE = {"import": 0.4, "weights": 0.5, "warm-up": 0.1}


class StartProgress:
    """Bars for one start of a client: bytes of the model, then the engines together. Use as a context manager.

    shown: None is in a notebook, and when stderr is a terminal. num_engines: how many load; may be set when it is
    known.
    """

    def __init__(self, shown: bool | None = None) -> None:
        self._in_notebook = _in_notebook()
        self._disabled = not (self._in_notebook or _on_terminal() if shown is None else shown)
        self.num_engines = 1
        self._fractions: dict[int, float] = {}
        self._fetch: tqdm[NoReturn] | None = None
        self._load: tqdm[NoReturn] | None = None

    def __enter__(self) -> StartProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._disabled = True  # a download goes on in its thread when a start is interrupted
        for bar in (self._fetch, self._load):
            if bar is not None:
                bar.close()

    def on_fetch(self, description: str, done_bytes: int, total_bytes: int | None) -> None:
        """Bytes of a model arrived. May be called from another thread."""
        if self._disabled:
            return
        if self._fetch is None:
            self._fetch = self._bar(desc=description, total=total_bytes, unit="B", unit_scale=True)
        self._fetch.total = total_bytes
        self._fetch.set_description(description, refresh=False)
        self._fetch.update(done_bytes - self._fetch.n)

    def on_loading(self, engine_id: int, phase: str, fraction: float) -> None:
        """An engine got so far with a phase of its start."""
        if self._disabled:
            return
        start, share = _PHASE_START.get(phase, 0.0), _PHASE_SHARE.get(phase, 0.0)
        self._fractions[engine_id] = max(self._fractions.get(engine_id, 0.0), start + share * fraction)
        if self._load is None:
            count = self.num_engines
            self._load = self._bar(
                desc=f"loading {count} engine{'s' if count > 1 else ''}",
                total=100,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}",
            )
        self._load.update(100 * sum(self._fractions.values()) / self.num_engines - self._load.n)

    def _bar(self, **arguments: Any) -> tqdm[NoReturn]:
        """One that is gone when it is closed."""
        if self._in_notebook:
            from asyncscale.notebook.progress_bar import notebook_bar

            return notebook_bar(**arguments)
        from tqdm import tqdm  # which takes as long to import as ten other modules

        return tqdm(leave=False, **arguments)


def _on_terminal() -> bool:
    stderr = sys.stderr  # None in a process that was started without one
    return stderr is not None and stderr.isatty()


def _in_notebook() -> bool:
    if "ipykernel" not in sys.modules:
        return False
    from asyncscale.notebook.cells import current_run

    return current_run() is not None
