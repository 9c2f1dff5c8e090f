"""`python -m asyncscale.bench tandem`: a mixture of experts spread over two engines, beside one that is not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import uvloop

from asyncscale.bench import tandem_experts, tandem_waves
from asyncscale.bench.environment import environment
from asyncscale.bench.table import Row, markdown_table, plain_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tandem`."""
    parser.add_argument("--quick", action="store_true", help="a tiny model, and a little of everything: that it runs")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and versions")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    rows = uvloop.run(_measure(quick=arguments.quick))
    print(markdown_table(rows) if arguments.markdown else plain_table(rows))
    if arguments.json is not None:
        values = {"rows": [row.to_dict() for row in rows], "quick": arguments.quick, **environment()}
        arguments.json.write_text(json.dumps(values, indent=2) + "\n")
    return 0


async def _measure(*, quick: bool) -> list[Row]:
    rows = await tandem_experts.measure(tandem_experts.QUICK if quick else tandem_experts.Plan())
    return rows + await tandem_waves.measure(tandem_waves.QUICK if quick else tandem_waves.Plan())
