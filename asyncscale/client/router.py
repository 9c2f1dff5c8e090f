"""Which engine gets the next request: a load table, and a policy that looks at it. No I/O, no clock of its own.

What this client has in flight on an engine is known exactly, here. What others have there is the engine's newest
report less what that report says is this client's. So a report, however old, never erases what was sent after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from asyncscale.client.affinity import PrefixTable, SessionTable
from asyncscale.client.policies import EngineLoad, Policy, RoutingRequest, least_loaded, measure_of
from asyncscale.messages import Load


class Decision(msgspec.Struct, frozen=True):
    """Where a request goes, and why.

    scores: engine id -> what the policy compares engines by, of every engine that was there at that moment.
    """

    engine_id: int
    scores: dict[int, float]


class _Engine:
    __slots__ = ("capacity", "load", "mine", "my_tokens", "reported_at")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.mine = 0
        self.my_tokens = 0
        self.load: Load | None = None
        self.reported_at = float("-inf")


class Router:
    """The load table of one client. Times are the caller's clock, in seconds; tokens are weights of requests.

    ::

        request = RoutingRequest(len(prompt), 100, session, router.home(session), router.cached_tokens(hashes))
        decision = router.pick(request, now)
        router.sent(decision.engine_id, 1, request.num_tokens)
        router.computed(decision.engine_id, hashes)                # with its first token
        router.ended(decision.engine_id, 1, request.num_tokens)

    Engines that are unknown, because they left or have not joined yet, are never an error.
    first_turn: where the first of equal engines is looked for; different in each client, lest all begin with the same.
    """

    def __init__(self, policy: Policy = least_loaded, first_turn: int = 0) -> None:
        self._policy = policy
        self._measure = measure_of(policy)
        self._first_turn = first_turn
        self._last_engine_id: int | None = None
        self._engines: dict[int, _Engine] = {}  # in order of their ids
        self._sessions = SessionTable()
        self._prefixes = PrefixTable()

    def __contains__(self, engine_id: int) -> bool:
        return engine_id in self._engines

    def __len__(self) -> int:
        return len(self._engines)

    # --- what happens

    def join(self, engine_id: int, capacity: int) -> None:
        """An engine takes requests from now on; `capacity` of them run at once."""
        self.leave(engine_id)
        self._engines = dict(sorted({**self._engines, engine_id: _Engine(capacity)}.items()))

    def leave(self, engine_id: int) -> None:
        """An engine takes no more requests, and what it had cached is gone."""
        if self._engines.pop(engine_id, None) is not None:
            self._sessions.forget(engine_id)
            self._prefixes.forget(engine_id)

    def report(self, engine_id: int, load: Load, now: float) -> None:
        """An engine's own counts arrived, by whatever way. Those that are older than the newest are ignored."""
        engine = self._engines.get(engine_id)
        if engine is None or (engine.load is not None and load.version < engine.load.version):
            return
        engine.load = load
        engine.reported_at = now

    def sent(self, engine_id: int, count: int = 1, tokens: int = 0) -> None:
        """So many requests, with so many tokens together, were sent to the engine."""
        engine = self._engines.get(engine_id)
        if engine is not None:
            engine.mine += count
            engine.my_tokens += tokens

    def ended(self, engine_id: int, count: int = 1, tokens: int = 0) -> None:
        """So many requests that were sent to the engine, with so many tokens together, ended or were taken back."""
        engine = self._engines.get(engine_id)
        if engine is not None:
            engine.mine = max(0, engine.mine - count)
            engine.my_tokens = max(0, engine.my_tokens - tokens)

    def computed(self, engine_id: int, hashes: Sequence[int]) -> None:
        """The engine has computed a prompt with these `prefix_hashes`: it is in the cache there."""
        if hashes and engine_id in self._engines:
            self._prefixes.computed(engine_id, hashes)

    # --- what follows from it

    def home(self, session: str | None) -> int | None:
        """The engine that has the session, if any does."""
        return None if session is None else self._sessions.home(session)

    def cached_tokens(self, hashes: Sequence[int]) -> dict[int, int]:
        """Engine id -> how many first tokens of the prompt with these `prefix_hashes` are cached there."""
        return self._prefixes.cached_tokens(hashes)

    def pick(self, request: RoutingRequest, now: float) -> Decision | None:
        """Where to send the request; None when it should be held back: no engine that accepts requests has a free slot,
        and this client has its fair share of every one.

        Raises TypeError when the policy returns something else than one of the loads that it was given.
        """
        loads = self.loads(now)
        candidates = self._in_turn(_with_room(loads))
        if not candidates:
            return None
        chosen = self._policy(candidates, request)
        if not any(chosen is load for load in candidates):
            name = getattr(self._policy, "__qualname__", None) or repr(self._policy)
            raise TypeError(f"routing policy {name} must return one of the loads it is given, got {chosen!r}")
        self._last_engine_id = chosen.engine_id
        if request.session is not None:
            self._sessions.settle(request.session, chosen.engine_id)
        return Decision(chosen.engine_id, {load.engine_id: self._measure(load) for load in loads})

    def has_room(self, now: float) -> bool:
        """Whether `pick` would find an engine."""
        return bool(_with_room(self.loads(now)))

    def excess(self, engine_id: int) -> int:
        """How many requests this client has at the engine beyond those that run there at once."""
        engine = self._engines.get(engine_id)
        return 0 if engine is None else max(0, engine.mine - engine.capacity)

    def newest_load(self, engine_id: int) -> Load | None:
        """The engine's newest report as it came, if there was one."""
        engine = self._engines.get(engine_id)
        return None if engine is None else engine.load

    def loads(self, now: float) -> list[EngineLoad]:
        """The whole table, in engine order."""
        return [_engine_load(engine_id, engine, now) for engine_id, engine in self._engines.items()]

    def scores(self, now: float) -> dict[int, float]:
        """What the policy compares engines by, of every engine."""
        return {load.engine_id: self._measure(load) for load in self.loads(now)}

    def _in_turn(self, loads: list[EngineLoad]) -> list[EngineLoad]:
        """Beginning after the engine that was chosen last, whichever of them have room now."""
        if self._last_engine_id is None:
            start = self._first_turn % max(1, len(loads))
        else:
            last = self._last_engine_id
            start = next((index for index, load in enumerate(loads) if load.engine_id > last), 0)
        return loads[start:] + loads[:start]


def _with_room(loads: list[EngineLoad]) -> list[EngineLoad]:
    accepting = [load for load in loads if load.accepting]
    return [load for load in accepting if not load.full] or [load for load in accepting if load.mine < load.share]


def _engine_load(engine_id: int, engine: _Engine, now: float) -> EngineLoad:
    load = engine.load
    if load is None:
        return EngineLoad(
            engine_id=engine_id,
            mine=engine.mine,
            others=0,
            capacity=engine.capacity,
            my_tokens=engine.my_tokens,
        )
    return EngineLoad(
        engine_id=engine_id,
        mine=engine.mine,
        others=max(0, load.running + load.waiting - load.mine),
        capacity=engine.capacity,
        running=load.running,
        waiting=load.waiting,
        kv_usage=load.used_blocks / load.num_blocks if load.num_blocks else 0.0,
        my_tokens=engine.my_tokens,
        other_tokens=max(0, load.tokens - load.my_tokens),
        accepting=load.accepting,
        share=load.share,
        age_s=now - engine.reported_at,
    )
