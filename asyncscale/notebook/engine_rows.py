"""The engines of a client as rows of a table: a snapshot, as HTML and as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from asyncscale.notebook.markup import AMBER, BLUE, GREEN, RED, Html, badge, bar, note, table

if TYPE_CHECKING:
    from asyncscale.client.client import AsyncScaleClient

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
        busy = load is not None and load.running > 0  # else the rate is of what has ended by now
        rows.append(
            EngineRow(
                engine_id=health.engine_id,
                state="paused" if load is not None and not load.accepting else health.state,
                running=0 if load is None else load.running,
                waiting=0 if load is None else load.waiting,
                capacity=0 if load is None else load.capacity,
                kv_usage=0.0 if load is None else load.kv_usage,
                restarts=health.restarts,
                tokens_per_s=None if rates is None else rates.get(health.engine_id, 0.0) if busy else 0.0,
            )
        )
    return rows


def rows_html(rows: Sequence[EngineRow]) -> Html:
    """The rows with bars: of requests, those that run and those that wait, and of the KV cache."""
    head = _head(rows)
    return table("engines", head, [[cells[name] for name in head] for cells in map(_html_cells, rows)])


def held_html(num_held: int) -> Html:
    """A line about the requests of this client that no engine has yet, if there are any."""
    if num_held == 0:
        return Html()
    return note(
        f"{num_held:,} request{'s' * (num_held != 1)} of this client wait{'s' * (num_held == 1)} for a free slot"
    )


def rows_text(rows: Sequence[EngineRow]) -> str:
    """The rows for a terminal, a screen reader, a log."""
    head = _head(rows)
    lines = [head, *([cells[name] for name in head] for cells in map(_text_cells, rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _head(rows: Sequence[EngineRow]) -> list[str]:
    return [
        *("engine", "state", "running", "waiting", "KV cache"),
        *(["tokens/s"] if any(row.tokens_per_s is not None for row in rows) else []),
        *(["restarts"] if any(row.restarts for row in rows) else []),
    ]


def _text_cells(row: EngineRow) -> dict[str, str]:
    return {
        "engine": str(row.engine_id),
        "state": row.state,
        "running": f"{row.running} of {row.capacity}" if row.capacity else "-",
        "waiting": str(row.waiting),
        "KV cache": f"{row.kv_usage:.1%}",
        "tokens/s": "-" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        "restarts": str(row.restarts),
    }


def _html_cells(row: EngineRow) -> dict[str, str]:
    cells = _text_cells(row)
    scale = max(row.capacity, row.running + row.waiting, 1)
    running, waiting = (row.running / scale, BLUE), (row.waiting / scale, AMBER)
    return cells | {
        "state": badge(row.state, _STATE_COLORS.get(row.state, RED)),
        "running": bar(cells["running"], running, waiting),
        "KV cache": bar(cells["KV cache"], (row.kv_usage, RED if row.kv_usage > 0.95 else BLUE)),
    }
