"""The tables of metrics are what is exposed."""

from __future__ import annotations

import re

from pages import DOCS

from asyncscale.metrics.catalog import ENGINE_LAYOUT, REQUEST_LAYOUT


def test_every_metric_is_in_the_table_as_it_is() -> None:
    rows = re.findall(
        r"^\| `(\w+)`( \*|) \| (\w+)[^|]* \| ([^|]*) \|$", (DOCS / "metrics.md").read_text(), re.MULTILINE
    )
    listed = [(name, not mark, kind, help) for name, mark, kind, help in rows]
    metrics = [*ENGINE_LAYOUT.metrics, *REQUEST_LAYOUT.metrics]
    assert listed == [(metric.name, metric.is_vllms, metric.kind, metric.help) for metric in metrics]
