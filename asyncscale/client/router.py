"""Which engine gets the next request: a load table and pure functions over it. No I/O, no clock of its own.

What this client has in flight on an engine is known exactly, here. What others have there is the engine's newest
report less what that report says is this client's. So a report, however old, never erases what was sent after it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from asyncscale.messages import Load

# A request of a session stays on the session's engine while that is no more than this many requests busier than the
# best.
SESSION_SLACK = 4
_MAX_SESSIONS = 65_536
# Less than one request: it decides between equals, and a burst stays spread to within one.
_KV_WEIGHT = 0.5


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's load as this client knows it.

    mine: this client's requests aboard, exact. others: those of other clients, from the engine's newest report, which
    is `age_s` seconds old (inf: none yet). running, waiting, kv_usage (0 to 1): from that report. capacity: most that
    run at once.
    """

    engine_id: int
    mine: int
    others: int
    capacity: int
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    age_s: float = float("inf")

    @property
    def in_flight(self) -> int:
        return self.mine + self.others

    @property
    def full(self) -> bool:
        return self.in_flight >= self.capacity

    @property
    def score(self) -> float:
        """Requests in flight, twice where they must wait for a slot, and a part of one request for a full KV cache."""
        return self.in_flight + max(0, self.in_flight - self.capacity) + _KV_WEIGHT * self.kv_usage


class RoutingRequest(msgspec.Struct, frozen=True):
    """What a policy may look at besides the loads."""

    num_prompt_tokens: int
    session: str | None = None


# Called with the engines in an order that rotates from pick to pick, so that taking the first of equals spreads ties
# evenly.
Policy = Callable[[Sequence[EngineLoad], RoutingRequest], EngineLoad]


def least_loaded(loads: Sequence[EngineLoad], request: RoutingRequest) -> EngineLoad:
    """The engine with the least score."""
    return min(loads, key=lambda load: load.score)


def round_robin(loads: Sequence[EngineLoad], request: RoutingRequest) -> EngineLoad:
    """Each engine in turn, whatever its load."""
    return loads[0]


POLICIES: dict[str, Policy] = {"least-loaded": least_loaded, "round-robin": round_robin}


class _Engine:
    __slots__ = ("capacity", "load", "mine", "reported_at")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.mine = 0
        self.load: Load | None = None
        self.reported_at = float("-inf")


class Router:
    """The load table of one client. Times are the caller's clock, in seconds."""

    def __init__(self, policy: Policy = least_loaded) -> None:
        self._policy = policy
        self._engines: dict[int, _Engine] = {}
        self._sessions: OrderedDict[str, int] = OrderedDict()
        self._turn = 0

    def __contains__(self, engine_id: int) -> bool:
        return engine_id in self._engines

    def __len__(self) -> int:
        return len(self._engines)

    def join(self, engine_id: int, capacity: int) -> None:
        """An engine takes requests from now on; `capacity` of them run at once."""
        self._engines[engine_id] = _Engine(capacity)

    def leave(self, engine_id: int) -> None:
        """An engine takes no more requests; not an error when it is unknown."""
        self._engines.pop(engine_id, None)

    def report(self, engine_id: int, load: Load, now: float) -> None:
        """An engine's own counts arrived. One that is older than the newest is ignored."""
        engine = self._engines.get(engine_id)
        if engine is None or (engine.load is not None and load.version < engine.load.version):
            return
        engine.load = load
        engine.reported_at = now

    def sent(self, engine_id: int, count: int = 1) -> None:
        """So many requests were sent to the engine."""
        if engine_id in self._engines:
            self._engines[engine_id].mine += count

    def ended(self, engine_id: int, count: int = 1) -> None:
        """So many requests that were sent to the engine ended, or were taken back."""
        if engine_id in self._engines:
            self._engines[engine_id].mine -= count

    def pick(self, request: RoutingRequest, now: float) -> int | None:
        """The engine for `request`, or None while every engine is full: then hold it back until one is not."""
        loads = [load for load in self.loads(now) if not load.full]
        if not loads:
            return None
        self._turn += 1
        turn = self._turn % len(loads)
        chosen = self._policy(loads[turn:] + loads[:turn], request)
        if request.session is not None:
            chosen = self._keep_session(request.session, chosen, loads)
        return chosen.engine_id

    def loads(self, now: float) -> list[EngineLoad]:
        """The whole table, in engine order."""
        return [_engine_load(engine_id, engine, now) for engine_id, engine in sorted(self._engines.items())]

    def _keep_session(self, session: str, best: EngineLoad, loads: Sequence[EngineLoad]) -> EngineLoad:
        home = next((load for load in loads if load.engine_id == self._sessions.get(session)), None)
        chosen = home if home is not None and home.score <= best.score + SESSION_SLACK else best
        self._sessions[session] = chosen.engine_id
        self._sessions.move_to_end(session)
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return chosen


def _engine_load(engine_id: int, engine: _Engine, now: float) -> EngineLoad:
    load = engine.load
    if load is None:
        return EngineLoad(engine_id=engine_id, mine=engine.mine, others=0, capacity=engine.capacity)
    return EngineLoad(
        engine_id=engine_id,
        mine=engine.mine,
        others=max(0, load.running + load.waiting - load.mine),
        capacity=engine.capacity,
        running=load.running,
        waiting=load.waiting,
        kv_usage=load.used_blocks / load.num_blocks if load.num_blocks else 0.0,
        age_s=now - engine.reported_at,
    )
