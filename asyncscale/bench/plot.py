"""The table's main figures as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asyncscale.bench.table import Row
from asyncscale.notebook.plots import AMBER, BLUE, INK, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _OTHERS = BLUE, AMBER


def check_plot(sections: Sequence[str]) -> None:
    """Before minutes of measuring: can a picture be made of these?

    Raises ValueError when none of them is shown in it, or without matplotlib.
    """
    if not set(sections) & set(_PANELS):
        raise ValueError(f"--plot shows {', '.join(_PANELS)}, and none of them is to be measured")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'asyncscale[bench]'")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write a picture of the sections that it shows, as PNG with a transparent background. See `check_plot`."""
    import matplotlib
    from matplotlib.figure import Figure

    sections = {row.section for row in rows}
    panels = [panel for section, panel in _PANELS.items() if section in sections]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 3.4), layout="constrained")
        for panel, ax in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            panel(rows, ax)
        figure.savefig(path, transparent=True, dpi=150)


def _seed(rows: Sequence[Row], ax: Axes) -> None:
    """Two engines at the published rate."""
    shown = [row.figures for row in rows if row.figures.get("published_ttft_mean_ms")]
    labels = [f"{figures['num_clients']:.0f} client" + "s" * (figures["num_clients"] != 1) for figures in shown]
    for offset, name, label, color in (
        (-0.2, "ttft_mean_ms", "asyncscale", _OURS),
        (0.2, "published_ttft_mean_ms", "vLLM, as published", _OTHERS),
    ):
        positions = [index + offset for index in range(len(shown))]
        bars = ax.bar(positions, [figures[name] or 0.0 for figures in shown], 0.38, color=color, label=label)
        ax.bar_label(bars, fmt="{:,.0f}", color=INK)
    ax.set_xticks(range(len(shown)), labels)
    ax.set_yscale("log")
    ax.margins(y=0.15)
    ax.set_title("Mean time to first token, ms\n(2 engines, 120 requests/s)")
    ax.legend(frameon=False)


def _throughput(rows: Sequence[Row], ax: Axes) -> None:
    shown = [row.figures for row in rows if "tokens_per_s" in row.figures]
    labels = [f"{figures['num_engines']:.0f} x {figures['num_clients']:.0f}" for figures in shown]
    bars = ax.bar(labels, [(figures["tokens_per_s"] or 0.0) / 1000 for figures in shown], 0.6, color=_OURS)
    ax.bar_label(bars, fmt="{:,.0f}", color=INK)
    ax.set_title("Tokens delivered, thousands per second\n(steps that cost nothing)")
    ax.set_xlabel("engines x clients")


def _streams(rows: Sequence[Row], ax: Axes) -> None:
    shown = [row.figures for row in rows if row.section == "streams" and "num_streams" in row.figures]
    labels = [f"{figures['num_streams']:,.0f}" for figures in shown]
    client, engines = ([figures[name] or 0.0 for figures in shown] for name in ("client_cpu_us", "engines_cpu_us"))
    ax.bar(labels, client, 0.6, color=_OURS, label="client")
    ax.bar(labels, engines, 0.6, bottom=client, color=_OTHERS, label="engines")
    ax.set_title("CPU per token, us")
    ax.set_xlabel("streams at once")
    ax.legend(frameon=False)


_PANELS: dict[str, Callable[[Sequence[Row], Axes], None]] = {
    "seed": _seed,
    "throughput": _throughput,
    "streams": _streams,
}
