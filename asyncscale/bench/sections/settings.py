"""What the parts have in common: how much is measured, and on what."""

from __future__ import annotations

from dataclasses import dataclass

from asyncscale import AsyncScaleClient, SimulatedModel
from asyncscale.bench.workload import WorkloadRequest, corpus, lognormal_requests

MODEL = SimulatedModel(base_ms=8, decode_us=35, prefill_us=10)
FREE = SimulatedModel(base_ms=0, decode_us=0, prefill_us=0, num_kv_blocks=200_000)
RATE = 120.0  # requests per second
MEAN_IN, MEAN_OUT = 220.6, 199.5  # tokens


@dataclass(frozen=True, slots=True)
class Settings:
    """fraction: of everything that is to be measured; less than 1 is to see that it runs."""

    fraction: float = 1.0

    def count(self, number: int) -> int:
        """So many requests, streams or tokens: at least one."""
        return max(1, round(self.fraction * number))

    def seconds(self, duration: float) -> float:
        return self.fraction * duration


def start_engines(num_engines: int, model: SimulatedModel = MODEL, max_num_seqs: int = 1024) -> AsyncScaleClient:
    """A client that is not started yet, with simulated engines."""
    return AsyncScaleClient(
        model,
        num_engines=num_engines,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=8192,
        progress=False,
    )


def trace(num_requests: int, rate: float, mean_out: float = MEAN_OUT) -> list[WorkloadRequest]:
    """The same requests in every process."""
    return lognormal_requests(corpus().encode(), num_requests, rate, MEAN_IN, mean_out, seed=0)


def deal(requests: list[WorkloadRequest], num_clients: int, index: int) -> list[WorkloadRequest]:
    """The share of client `index`: requests go to clients in turn, as they arrive."""
    return requests[index::num_clients]
