"""What engines and clients have done, counted: one view of all of them, whichever client is asked.

::

    metrics = client.metrics()              # at once: the newest that this client knows
    metrics = await client.metrics()        # of this moment, after a round over all clients
    metrics.engines[0].generation_tokens
    metrics.requests.time_to_first_token_seconds.quantile(0.99)

What an engine counts is in `EngineMetrics`, what clients count of requests in `RequestMetrics`. Names are vLLM's where
the meaning is the same. `AsyncScaleCollector` gives them to prometheus_client.
"""

from __future__ import annotations

from asyncscale.metrics.catalog import EngineMetrics, RequestMetrics
from asyncscale.metrics.histogram import Histogram
from asyncscale.metrics.prometheus import AsyncScaleCollector
from asyncscale.metrics.snapshot import Metrics

__all__ = ["AsyncScaleCollector", "EngineMetrics", "Histogram", "Metrics", "RequestMetrics"]
