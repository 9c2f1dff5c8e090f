"""The engines of a client as rows of a table: a snapshot, as HTML and as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from asyncscale.notebook.markup import AMBER, BLUE, GREEN, RED, Html, badge, bar, note, table

if TYPE_CHECKING:
    from asyncscale.client.client import AsyncScaleClient

_HEAD = ("engine", "state", "running", "waiting", "KV cache", "restarts")
_STATE_COLORS = {"ready": GREEN, "paused": AMBER, "restarting": AMBER, "dead": RED}


class EngineRow(NamedTuple):
    """state: of `EngineHealth`, or "paused" while it accepts no requests. running, waiting: requests of all clients;
    capacity: most that run at once. kv_usage: 0 to 1. tokens_per_s: None when it is not known."""

    engine_id: int
    state: str
    running: int
    waiting: int
    capacity: int
    kv_usage: float
    restarts: int
    tokens_per_s: float | None = None


def engine_rows(client: AsyncScaleClient, rates: Mapping[int, float] | None = None) -> list[EngineRow]:
    """Every engine as it is now, also those that died. rates: tokens per second by engine id, where they are known."""
    loads = {load.engine_id: load for load in client.engine_loads()}
    rows = []
    for health in client.health():
        load = loads.get(health.engine_id)
        rows.append(
            EngineRow(
                engine_id=health.engine_id,
                state="paused" if load is not None and not load.accepting else health.state,
                running=0 if load is None else load.running,
                waiting=0 if load is None else load.waiting,
                capacity=0 if load is None else load.capacity,
                kv_usage=0.0 if load is None else load.kv_usage,
                restarts=health.restarts,
                tokens_per_s=None if rates is None else rates.get(health.engine_id, 0.0),
            )
        )
    return rows


def rows_html(rows: Sequence[EngineRow]) -> Html:
    """The rows with bars: of requests, those that run and those that wait, and of the KV cache."""
    return table("engines", _head(rows), [_html_cells(row) for row in rows])


def held_html(num_held: int) -> Html:
    """A line about the requests of this client that no engine has yet, if there are any."""
    if num_held == 0:
        return Html()
    return note(
        f"{num_held:,} request{'s' * (num_held != 1)} of this client wait{'s' * (num_held == 1)} for a free slot"
    )


def rows_text(rows: Sequence[EngineRow]) -> str:
    """The rows for a terminal, a screen reader, a log."""
    lines = [_head(rows), *(_text_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _head(rows: Sequence[EngineRow]) -> list[str]:
    return [*_HEAD, *(["tokens/s"] if any(row.tokens_per_s is not None for row in rows) else [])]


def _text_cells(row: EngineRow) -> list[str]:
    cells = [
        str(row.engine_id),
        row.state,
        f"{row.running} of {row.capacity}" if row.capacity else "-",
        str(row.waiting),
        f"{row.kv_usage:.1%}",
        str(row.restarts),
    ]
    return cells if row.tokens_per_s is None else [*cells, f"{row.tokens_per_s:,.0f}"]


def _html_cells(row: EngineRow) -> list[str]:
    cells = _text_cells(row)
    scale = max(row.capacity, row.running + row.waiting, 1)
    cells[1] = badge(row.state, _STATE_COLORS.get(row.state, RED))
    cells[2] = bar(cells[2], (row.running / scale, BLUE), (row.waiting / scale, AMBER))
    cells[4] = bar(cells[4], (row.kv_usage, RED if row.kv_usage > 0.95 else BLUE))
    return cells
