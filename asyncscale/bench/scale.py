"""`python -m asyncscale.bench scale`: what the serving layer itself costs, with simulated models, as one table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import uvloop

from asyncscale.bench.environment import environment
from asyncscale.bench.plot import check_plot, plot
from asyncscale.bench.sections import attach, freshness, idle, many, seed, serve, streams, throughput
from asyncscale.bench.sections.settings import Settings
from asyncscale.bench.table import Row, markdown_table, plain_table

_QUICK = 1 / 8

SECTIONS: dict[str, Callable[[Settings], Awaitable[list[Row]]]] = {
    serve.SERVE: serve.measure,
    serve.SERVE_10000: serve.measure_10000,
    seed.SECTION: seed.measure,
    throughput.SECTION: throughput.measure,
    streams.SECTION: streams.measure,
    many.SECTION: many.measure,
    freshness.SECTION: freshness.measure,
    attach.SECTION: attach.measure,
    idle.SECTION: idle.measure,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scale`."""
    parser.add_argument(
        "--only", type=_sections, default=list(SECTIONS), metavar="NAME,...", help=f"of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of everything: to see that it runs")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and versions")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the main figures (needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    if arguments.plot is not None:
        check_plot(arguments.only)
    rows = uvloop.run(_measure(arguments.only, Settings(_QUICK if arguments.quick else 1.0)))
    print(markdown_table(rows) if arguments.markdown else plain_table(rows))
    if arguments.json is not None:
        values = {"rows": [row.to_dict() for row in rows], "quick": arguments.quick, **environment()}
        arguments.json.write_text(json.dumps(values, indent=2) + "\n")
    if arguments.plot is not None:
        plot(rows, arguments.plot)
    return 0


async def _measure(names: Sequence[str], settings: Settings) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        start = time.monotonic()
        print(f"{name} ...", end="", file=sys.stderr, flush=True)
        rows += await SECTIONS[name](settings)
        print(f" {time.monotonic() - start:.0f} s", file=sys.stderr)
    return rows


def _sections(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    return names
