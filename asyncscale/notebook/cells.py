"""Which cell of a notebook runs, and what it made when it ran before."""

from __future__ import annotations

import sys
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakSet

T = TypeVar("T")


class Run(NamedTuple):
    """One run of a cell.

    cell: the same whenever the cell is run, also after it was edited, where the frontend says which cell it is
    (JupyterLab and VS Code do); else the same source is the same cell. request: of the frontend, different each time.
    number: N in ``In [N]``.
    """

    cell: str
    request: str
    number: int


def current_run() -> Run | None:
    """The run that called this, by whatever way; None outside of a kernel's cells.

    Source: `execute_request` of Jupyter's messaging protocol, whose metadata may hold a "cellId".
    """
    ipython = sys.modules.get("IPython")
    shell: Any = None if ipython is None else ipython.get_ipython()
    request = getattr(shell, "parent_header", None) or {}  # despite its name, all of the message
    header, content = request.get("header", {}), request.get("content", {})
    if header.get("msg_type") != "execute_request":
        return None
    cell = request.get("metadata", {}).get("cellId") or content.get("code", "")
    return Run(cell, header.get("msg_id", ""), shell.displayhook.prompt_count)


class MadeInCells(Generic[T]):
    """What each cell made in its newest run. Nothing lives longer for being here.

    ::

        run, earlier = made.replaced_by(new)
    """

    def __init__(self) -> None:
        self._newest: dict[str, tuple[Run, WeakSet[T]]] = {}

    def replaced_by(self, new: T) -> tuple[Run | None, list[T]]:
        """Note that the running cell made `new`. The cell's run before this one, and what it made and still lives."""
        run = current_run()
        if run is None:
            return None, []
        before, made = self._newest.get(run.cell, (run, WeakSet()))
        earlier: list[T] = []
        if before.request != run.request:
            earlier, made = list(made), WeakSet()
        made.add(new)
        self._newest = {cell: newest for cell, newest in self._newest.items() if newest[1]}
        self._newest[run.cell] = (run, made)
        return before, earlier
