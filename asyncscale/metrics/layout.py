"""How the metrics of a dataclass lie in a row of whole numbers: so they are counted, summed, mapped and sent.

::

    @dataclass(frozen=True)
    class Metrics:
        num_waiting: int = gauge("Requests that wait.")
        served: Mapping[str, int] = counter("Requests that were served.", label="how", values=("well", "badly"))
        wait_seconds: Histogram = seconds("How long they waited.", buckets=(1, 10))

    layout = Layout(Metrics)
    cells = layout.zeros()
    cells[layout.at("served", "well")] += 1
    layout.observer(cells, "wait_seconds")(3.5)
    layout.read(cells)                      # a Metrics

What is no whole number is kept in millionths: sums of whole numbers are the same in whichever order they are made, and
a sum that seems to fall by a rounding error is a restart to who reads it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any, Generic, Literal, Protocol, TypeVar

from asyncscale.metrics.histogram import Histogram

Kind = Literal["gauge", "counter", "histogram"]
Values = TypeVar("Values")

FRACTION = 1_000_000  # so many are one
# What is more is cut: these are written with 64 bits.
_MAX_CELL = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. name: without prefix, and of a counter without Prometheus's suffix `_total`.

    unit: how many in the row are one. is_vllms: vLLM has one of the same name and meaning. label, values: of a counter
    that is kept for each of some values of a label. bounds: of a histogram's buckets. has_engine: it is counted for
    each engine.
    """

    name: str
    kind: Kind
    help: str
    is_vllms: bool
    unit: int = 1
    label: str = ""
    values: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    has_engine: bool = True

    @property
    def num_cells(self) -> int:
        return len(self.bounds) + 2 if self.kind == "histogram" else len(self.values) or 1


def gauge(help: str, **options: Any) -> Any:
    """A field for what goes up and down; it is 0 of whoever is gone. options: of Metric."""
    return _field("gauge", help, **options)


def counter(help: str, **options: Any) -> Any:
    """A field for what only grows."""
    return _field("counter", help, **options)


def histogram(help: str, *, buckets: tuple[float, ...], **options: Any) -> Any:
    """A field for how whole numbers are distributed."""
    return _field("histogram", help, bounds=buckets, **options)


def seconds(help: str, *, buckets: tuple[float, ...], **options: Any) -> Any:
    """A field for how times are distributed."""
    return _field("histogram", help, bounds=buckets, unit=FRACTION, **options)


def _field(kind: Kind, help: str, *, vllm: bool = False, **options: Any) -> Any:
    return field(metadata={"kind": kind, "help": help, "is_vllms": vllm, **options})


class Observe(Protocol):
    """Takes a value, or several equal ones, into a histogram."""

    def __call__(self, value: float, count: int = 1, /) -> None: ...


class Layout(Generic[Values]):
    """The row of numbers that goes with a dataclass of metrics. size: how many numbers. metrics: in order."""

    def __init__(self, kind: type[Values]) -> None:
        self._kind = kind
        self.metrics = tuple(
            Metric(entry.name, **entry.metadata)
            for entry in fields(kind)  # type: ignore[arg-type]
            if "kind" in entry.metadata
        )
        ends = list(accumulate((metric.num_cells for metric in self.metrics), initial=0))
        self.size = ends.pop()
        self._starts = {metric.name: start for metric, start in zip(self.metrics, ends, strict=True)}
        self._by_name = {metric.name: metric for metric in self.metrics}
        self._gauges = [self._starts[metric.name] for metric in self.metrics if metric.kind == "gauge"]

    def zeros(self) -> list[int]:
        return [0] * self.size

    def at(self, name: str, value: str | None = None) -> int:
        """Where a gauge or counter lies; value: of its label."""
        start = self._starts[name]
        return start if value is None else start + self._by_name[name].values.index(value)

    def observer(self, cells: MutableSequence[int], name: str) -> Observe:
        """The function that takes values into a histogram in `cells`: how many fell into each bucket, then their sum.

        A clock that went backwards counts as one that stood still.
        """
        metric, start = self._by_name[name], self._starts[name]
        bounds, unit, sum_at = metric.bounds, metric.unit, start + metric.num_cells - 1

        def observe(value: float, count: int = 1, /) -> None:
            cells[start + bisect_left(bounds, value)] += count
            if value > 0:
                cells[sum_at] += round(value * unit) * count

        return observe

    def sum(self, rows: Iterable[Sequence[int]]) -> list[int]:
        """All of them together."""
        return [min(sum(column), _MAX_CELL) for column in zip(self.zeros(), *rows, strict=True)]

    def without_gauges(self, cells: Sequence[int]) -> list[int]:
        """What counts for good of one who is gone."""
        left = list(cells)
        for index in self._gauges:
            left[index] = 0
        return left

    def read(self, cells: Sequence[int]) -> Values:
        """The dataclass of these numbers."""
        return self._kind(**{metric.name: _value(metric, cells, self._starts[metric.name]) for metric in self.metrics})


def _value(metric: Metric, cells: Sequence[int], start: int) -> int | float | Histogram | Mapping[str, int]:
    if metric.kind == "histogram":
        *counts, total = cells[start : start + metric.num_cells]
        return Histogram(metric.bounds, tuple(counts), total if metric.unit == 1 else total / metric.unit)
    if metric.values:
        return {value: cells[start + index] for index, value in enumerate(metric.values)}
    return cells[start] if metric.unit == 1 else cells[start] / metric.unit
