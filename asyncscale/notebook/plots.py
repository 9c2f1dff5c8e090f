"""Matplotlib figures that can be read on a white page and on a black one."""

from __future__ import annotations

from typing import Any

# Against white and against #111, these have about the same contrast.
INK, BLUE, AMBER, GREEN, RED = "#808080", "#2f8fd8", "#d8892f", "#3fa66b", "#d9534f"

STYLE: Any = {  # matplotlib names every key in its types
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def readable_plots() -> None:
    """From now on, all figures of this process have no background, and mid-tone text and colours.

    ::

        from asyncscale.notebook.plots import readable_plots
        readable_plots()

    Raises ImportError without matplotlib (the extra "bench").
    """
    import matplotlib
    from cycler import cycler

    matplotlib.rcParams.update({**STYLE, "axes.prop_cycle": cycler(color=[BLUE, AMBER, GREEN, RED])})
