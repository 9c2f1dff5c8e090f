"""Histograms with fixed buckets, as Prometheus has them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

# Upper bounds of the buckets; vLLM's (vllm/v1/metrics/buckets.py of 0.32), so that dashboards fit.
TIME_TO_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
INTER_TOKEN_LATENCY_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
ITERATION_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REQUEST_PARAMS_N_BUCKETS = (1, 2, 5, 10, 20)
# vLLM's end at the model's context; these are the same for every model.
REQUEST_TOKENS_BUCKETS = tuple(mantissa * 10**exponent for exponent in range(6) for mantissa in (1, 2, 5))


@dataclass(frozen=True, slots=True, repr=False)
class Histogram:
    """How often values fell where::

        before = client.metrics().requests.inter_token_latency_seconds
        before.count, before.mean, before.quantile(0.99)
        now = client.metrics().requests.inter_token_latency_seconds
        (now - before).mean                     # of what came in between

    bounds: ascending; bucket i holds values above bounds[i - 1] and up to bounds[i], the last one those above all.
    counts: of each bucket. sum: of the values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """How many values."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """None when there is no value."""
        return self.sum / self.count if self.count else None

    def quantile(self, q: float) -> float | None:
        """An estimate of the value below which a share `q` (0 to 1) of all lies; None when there is no value.

        It is as exact as the bucket is narrow: values are taken to be spread evenly in it, and none above the highest
        bound, as PromQL's histogram_quantile does. Raises ValueError.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be from 0 to 1, got {q!r}")
        if not self.count:
            return None
        rank = q * self.count
        cumulative = list(accumulate(self.counts))
        bucket = next(i for i, total in enumerate(cumulative) if total >= rank and self.counts[i])
        if bucket == len(self.bounds):
            return self.bounds[-1]
        low = self.bounds[bucket - 1] if bucket else 0.0
        below = cumulative[bucket] - self.counts[bucket]
        return low + (self.bounds[bucket] - low) * max(0.0, rank - below) / self.counts[bucket]

    def __repr__(self) -> str:
        return f"Histogram(count={self.count}, sum={self.sum:g})"

    def __sub__(self, earlier: Histogram) -> Histogram:
        """What came since `earlier`, an older one of the same metric."""
        if not isinstance(earlier, Histogram):
            return NotImplemented
        if earlier.bounds != self.bounds:
            raise ValueError("histograms of different metrics have nothing in common")
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return Histogram(self.bounds, counts, self.sum - earlier.sum)
