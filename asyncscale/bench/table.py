"""Measured rows, as one table: for a terminal, for a README, and as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_HEADER = ("section", "what", "measured", "target", "met")
_MET = {True: "yes", False: "no", None: ""}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    figures: what was measured, by name; None is not known. shown: a format string of them. target: in words.
    met: whether it was reached; None when there is none to reach.
    """

    section: str
    what: str
    figures: Mapping[str, float | None]
    shown: str
    target: str = ""
    met: bool | None = None

    @property
    def measured(self) -> str:
        known = {name: float("nan") if value is None else value for name, value in self.figures.items()}
        return self.shown.format_map(known)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        del values["shown"]
        return values | {"measured": self.measured}


def plain_table(rows: Sequence[Row]) -> str:
    """Columns aligned by spaces; the name of a section on its first row only."""
    lines = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def markdown_table(rows: Sequence[Row]) -> str:
    """GitHub's."""
    header, *lines = _cells(rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ("---",) * len(header), *lines))


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    cells: list[tuple[str, ...]] = [_HEADER]
    previous = None
    for row in rows:
        section = "" if row.section == previous else row.section
        cells.append((section, row.what, row.measured, row.target, _MET[row.met]))
        previous = row.section
    return cells
