"""Metrics for prometheus_client (extra ``asyncscale[metrics]``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

from asyncscale.errors import AsyncScaleError
from asyncscale.metrics.catalog import ENGINE_LAYOUT, REQUEST_LAYOUT
from asyncscale.metrics.client_ledger import sum_by_engine
from asyncscale.metrics.histogram import Histogram
from asyncscale.metrics.layout import Layout, Metric
from asyncscale.metrics.snapshot import EngineRows, Metrics, RequestRows

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

PREFIX = "asyncscale:"

# Values of labels by their names, and the numbers that go with them.
_Labelled = tuple[dict[str, str], list[int]]


class HasMetrics(Protocol):
    """A client, asynchronous or blocking."""

    def metrics(self) -> Metrics: ...


class AsyncScaleCollector:
    """Gives prometheus_client what all engines and all clients have counted::

        from prometheus_client import CollectorRegistry, generate_latest
        from asyncscale.metrics import AsyncScaleCollector

        registry = CollectorRegistry()                      # or prometheus_client.REGISTRY
        registry.register(AsyncScaleCollector(client))
        text = generate_latest(registry)                    # or start_http_server(8000, registry=registry)

    One collector shows everything, whichever client has it. Where several processes are scraped in turn, as behind one
    port, make it in each when its client has started. It asks nobody, so a scrape may come in any thread, also in that
    of the event loop.

    Labels: model_name; engine, which is "" for requests that no engine had; and with `per_client` client: those that
    are gone are "departed". A client that is closed shows nothing. Raises ImportError without prometheus_client.
    """

    def __init__(self, client: HasMetrics, *, per_client: bool = False) -> None:
        _family_of_kind()
        self._client = client
        self._per_client = per_client
        with contextlib.suppress(AsyncScaleError):  # it is not started yet
            client.metrics()  # an attached client asks its owner from the first look on: before the first scrape

    def describe(self) -> Iterator[Family]:
        """All metrics without values: the registry looks whether it has one of these names."""
        yield from self._families(ENGINE_LAYOUT, {}, [])
        yield from self._families(REQUEST_LAYOUT, {}, [])

    def collect(self) -> Iterator[Family]:
        """All metrics of this moment."""
        try:
            metrics = self._client.metrics()
        except AsyncScaleError:  # it is closed
            return
        engines, clients = metrics.counts
        always = {"model_name": metrics.model_name}
        yield from self._families(ENGINE_LAYOUT, always, [({"engine": str(key)}, row) for key, row in engines.items()])
        if self._per_client:
            rows = [one for client, by_engine in clients.items() for one in _rows(engines, by_engine, client=client)]
        else:
            rows = list(_rows(engines, sum_by_engine(clients.values())))
        yield from self._families(REQUEST_LAYOUT, always, rows)

    def _families(self, layout: Layout[Any], always: Mapping[str, str], rows: Iterable[_Labelled]) -> Iterator[Family]:
        read = [(labels, layout.read(row)) for labels, row in rows]
        per_client = self._per_client and layout is REQUEST_LAYOUT
        for metric in layout.metrics:
            names = ["model_name"]
            names += ["engine"] if metric.has_engine else []
            names += ["client"] if per_client else []
            names += [metric.label] if metric.label else []
            family = _family_of_kind()[metric.kind](PREFIX + metric.name, metric.help, labels=names)
            for labels, values in read:
                value = getattr(values, metric.name)
                if _belongs(metric, labels["engine"], value):
                    _add(family, metric, [{**always, **labels}.get(name, "") for name in names], value)
            yield family


def _rows(engines: EngineRows, by_engine: RequestRows, **labels: str) -> Iterator[_Labelled]:
    """Also for engines that had no request yet: what begins at 0 shows its first change, too."""
    for engine_id in (None, *engines.keys() | {key for key in by_engine if key is not None}):
        label = "" if engine_id is None else str(engine_id)
        yield {"engine": label, **labels}, by_engine.get(engine_id) or REQUEST_LAYOUT.zeros()


def _belongs(metric: Metric, engine: str, value: Any) -> bool:
    """Whether it makes sense for that engine, or for none."""
    if engine:
        return metric.has_engine
    is_zero = (
        value.count == 0 if isinstance(value, Histogram) else not any(value.values() if metric.values else [value])
    )
    return not (metric.has_engine and is_zero)


def _add(family: Any, metric: Metric, labels: list[str], value: Any) -> None:
    if isinstance(value, Histogram):
        bounds = [*(str(float(bound)) for bound in value.bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(value.counts), strict=True)), value.sum)
    elif metric.values:
        for name, count in value.items():
            family.add_metric([*labels[:-1], name], count)
    else:
        family.add_metric(labels, value)


def _family_of_kind() -> dict[str, Any]:
    try:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    except ImportError:
        raise ImportError("AsyncScaleCollector needs prometheus_client: pip install 'asyncscale[metrics]'") from None
    return {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
