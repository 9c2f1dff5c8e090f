"""Histograms and the rows of numbers that they lie in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncscale.metrics import EngineMetrics, Histogram, RequestMetrics
from asyncscale.metrics.catalog import ENGINE_LAYOUT, REQUEST_LAYOUT
from asyncscale.metrics.layout import Layout, counter, gauge, histogram, seconds


@dataclass(frozen=True)
class Example:
    num_waiting: int = gauge("Requests that wait.")
    served: Mapping[str, int] = counter("Requests served.", label="how", values=("well", "badly"))
    wait_seconds: Histogram = seconds("How long they waited.", buckets=(1, 10))
    size: Histogram = histogram("How large they were.", buckets=(1, 10))


LAYOUT = Layout(Example)


def test_a_row_is_read_as_what_was_counted() -> None:
    cells = LAYOUT.zeros()
    cells[LAYOUT.at("num_waiting")] = 3
    cells[LAYOUT.at("served", "badly")] += 2
    observe = LAYOUT.observer(cells, "wait_seconds")
    observe(0.25)
    observe(1.0)  # a bucket holds its bound
    observe(2.5, 2)
    observe(11)
    observe(-0.001)  # a clock went backwards
    assert LAYOUT.read(cells) == Example(
        num_waiting=3,
        served={"well": 0, "badly": 2},
        wait_seconds=Histogram((1, 10), (3, 2, 1), 17.25),
        size=Histogram((1, 10), (0, 0, 0), 0),
    )
    assert LAYOUT.read(LAYOUT.without_gauges(cells)).num_waiting == 0
    assert LAYOUT.read(LAYOUT.sum([cells, cells])).wait_seconds == Histogram((1, 10), (6, 4, 2), 34.5)
    assert LAYOUT.sum([]) == LAYOUT.zeros()


@given(st.lists(st.floats(0, 1e5), max_size=20), st.randoms())
def test_sums_do_not_depend_on_the_order(values: list[float], random) -> None:  # type: ignore[no-untyped-def]
    rows = []
    for value in values:
        rows.append(LAYOUT.zeros())
        LAYOUT.observer(rows[-1], "wait_seconds")(value)
    total = LAYOUT.sum(rows)
    random.shuffle(rows)
    assert LAYOUT.sum([LAYOUT.sum(rows[:7]), LAYOUT.sum(rows[7:])]) == total


def test_what_no_message_could_hold_is_cut() -> None:
    row = LAYOUT.zeros()
    row[0] = 2**63 - 1
    assert LAYOUT.sum([row, row])[0] == 2**63 - 1


def test_quantiles_lie_in_the_bucket_of_their_rank() -> None:
    values = Histogram((1, 2, 4), (0, 2, 2, 0), 9.0)
    assert (values.count, values.mean) == (4, 2.25)
    assert [values.quantile(q) for q in (0, 0.25, 0.5, 0.75, 1)] == [1, 1.5, 2, 3, 4]
    assert Histogram((1, 2), (0, 0, 3), 100.0).quantile(0.5) == 2  # all that is known: it is above
    assert (Histogram((1,), (0, 0), 0).mean, Histogram((1,), (0, 0), 0).quantile(0.5)) == (None, None)
    with pytest.raises(ValueError, match="from 0 to 1"):
        values.quantile(99)


def test_what_came_in_between_is_the_difference() -> None:
    earlier, later = Histogram((1, 2), (1, 0, 0), 0.5), Histogram((1, 2), (1, 2, 0), 3.5)
    assert later - earlier == Histogram((1, 2), (0, 2, 0), 3.0)
    with pytest.raises(ValueError, match="different metrics"):
        later - Histogram((1, 3), (0, 0, 0), 0.0)


@pytest.mark.parametrize(("kind", "layout"), [(EngineMetrics, ENGINE_LAYOUT), (RequestMetrics, REQUEST_LAYOUT)])
def test_every_field_is_a_metric_with_a_place_of_its_own(kind, layout) -> None:  # type: ignore[no-untyped-def]
    assert [metric.name for metric in layout.metrics] == [field.name for field in fields(kind)]
    assert sum(metric.num_cells for metric in layout.metrics) == layout.size
    read = layout.read(list(range(layout.size)))
    for metric in layout.metrics:
        value = getattr(read, metric.name)
        expected = {"histogram": Histogram}.get(
            metric.kind, Mapping if metric.values else int if metric.unit == 1 else float
        )
        assert isinstance(value, expected), metric.name
        if metric.kind == "histogram":
            assert (metric.unit != 1) == metric.name.endswith("_seconds")
