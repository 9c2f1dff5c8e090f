"""What a routing policy sees, and the policies: pure functions from the engines' loads to one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

# A request stays where its past is cached while that engine is no more than so many requests busier than the best: for
# least-tokens, so many requests like this one.
AFFINITY_SLACK = 4
# Less than one request: it decides between equals, and a burst stays spread to within one.
_KV_WEIGHT = 0.5


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's load as this client knows it.

    mine, my_tokens: this client's requests aboard and their weight in tokens (prompt + expected output), exact.
    others, other_tokens: those of all other clients, from the engine's newest report, which is `age_s` seconds old
    (inf: none yet). running, waiting, kv_usage (0 to 1): from that report. capacity: most that run at once.
    accepting: False while the engine is paused or draining. share: this client's fair part of capacity, as the engine
    said last: beside other clients it may have so many there, though the engine is full.
    """

    engine_id: int
    mine: int
    others: int
    capacity: int
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    my_tokens: int = 0
    other_tokens: int = 0
    accepting: bool = True
    share: int = 0
    age_s: float = float("inf")

    @property
    def in_flight(self) -> int:
        """Requests aboard, of all clients."""
        return self.mine + self.others

    @property
    def tokens(self) -> int:
        """The weight of all that is aboard, in tokens."""
        return self.my_tokens + self.other_tokens

    @property
    def full(self) -> bool:
        """Whether one more request would have to wait there."""
        return self.mine + self.others >= self.capacity

    @property
    def score(self) -> float:
        """Requests in flight, twice where they must wait for a slot, and a part of one request for a full KV cache."""
        in_flight = self.mine + self.others
        return in_flight + max(0, in_flight - self.capacity) + _KV_WEIGHT * self.kv_usage

    @property
    def token_score(self) -> float:
        """Tokens in flight, and a part of one token for a full KV cache."""
        return self.my_tokens + self.other_tokens + _KV_WEIGHT * self.kv_usage


class RoutingRequest(msgspec.Struct, frozen=True):
    """What a policy may look at besides the loads.

    num_output_tokens: as many as the client expects. home: the engine that has the session, if any does.
    cached_tokens: engine id -> how many of the prompt's first tokens this client knows to be cached there; engines that
    have none are left out.
    """

    num_prompt_tokens: int
    num_output_tokens: int = 0
    session: str | None = None
    home: int | None = None
    cached_tokens: Mapping[int, int] = {}

    @property
    def num_tokens(self) -> int:
        """The request's weight: prompt and expected output."""
        return self.num_prompt_tokens + self.num_output_tokens


# Called with the engines that accept requests and have a free slot, or, when there is none, those where this client has
# less than its share; at least one. They begin with the one after the
# engine that was chosen last, so that taking the first of equals has no favourite.
Policy = Callable[[Sequence[EngineLoad], RoutingRequest], EngineLoad]
Measure = Callable[[EngineLoad], float]


def least_loaded(loads: Sequence[EngineLoad], request: RoutingRequest) -> EngineLoad:
    """The engine with the least score, or one not much busier that has the request's past."""
    return _least(loads, request, _score, AFFINITY_SLACK)


def least_tokens(loads: Sequence[EngineLoad], request: RoutingRequest) -> EngineLoad:
    """The engine with the fewest tokens in flight, or one not much busier that has the request's past."""
    # The request's own size is the unit: what a cached past saves grows with it, and no constant fits all models.
    return _least(loads, request, _token_score, AFFINITY_SLACK * request.num_tokens)


def round_robin(loads: Sequence[EngineLoad], request: RoutingRequest) -> EngineLoad:
    """Each engine in turn, whatever its load."""
    return loads[0]


POLICIES: dict[str, Policy] = {
    "least-loaded": least_loaded,
    "least-tokens": least_tokens,
    "round-robin": round_robin,
}


def measure_of(policy: Policy) -> Measure:
    """What a policy compares engines by; for one of the user's own, the score."""
    return _token_score if policy is least_tokens else _score


def _least(loads: Sequence[EngineLoad], request: RoutingRequest, measure: Measure, slack: float) -> EngineLoad:
    if request.home is None and not request.cached_tokens:
        return min(loads, key=measure)
    limit = min(map(measure, loads)) + slack
    near = [load for load in loads if measure(load) <= limit]
    for load in near:
        if load.engine_id == request.home:
            return load
    return min(near, key=lambda load: (-request.cached_tokens.get(load.engine_id, 0), measure(load)))


def _score(load: EngineLoad) -> float:
    return load.score


def _token_score(load: EngineLoad) -> float:
    return load.token_score
