"""A request as an engine knows it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from asyncscale.params import Sampling


@dataclass(slots=True, eq=False)
class Request:
    """One choice of a client's request; `key` is (client, request_id).

    token_ids: int32, prompt and then tokens generated before it was (re)queued; while it runs, its row of the
    SequenceTable is the truth. row: -1 while it waits.
    weight: see `Add`. order: counts arrivals at this engine. block_digests: of its full KV-cache blocks, from the first
    on, as far as they were needed yet. num_prompt_logprobs: how many prompt positions' logprobs its client has.
    num_bytes: what it takes of its client's `Quota`.
    """

    client: bytes
    request_id: int
    token_ids: npt.NDArray[np.int32]
    num_prompt_tokens: int
    sampling: Sampling
    priority: int = 0
    weight: int = 0
    arrival: float = 0.0
    order: int = 0
    row: int = -1
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    siblings: list[Request] = field(default_factory=list)  # further choices, queued when this one's prompt is computed
    block_digests: list[bytes] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    num_bytes: int = 0

    @property
    def key(self) -> tuple[bytes, int]:
        return self.client, self.request_id

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first, and is preempted last."""
        return self.priority, self.order
