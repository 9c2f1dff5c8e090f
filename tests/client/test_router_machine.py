"""Every operation of the router in every order, against engines of which the truth is known."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncscale.client.affinity import CHUNK_TOKENS
from asyncscale.client.policies import Policy, RoutingRequest, least_loaded, least_tokens
from asyncscale.client.router import Router
from asyncscale.messages import Load

CAPACITY = 3
ENGINES = st.integers(0, 3)
TOKENS = st.integers(1, 500)


@dataclass
class Engine:
    """What is aboard by weight, what of this client's is still on its way, and the newest counts that arrived."""

    mine: list[int] = field(default_factory=list)
    num_arrived: int = 0  # of mine
    others: list[int] = field(default_factory=list)
    paused: bool = False
    version: int = 0
    reports: list[Load] = field(default_factory=list)  # sent, not arrived
    known: Load | None = None

    def emit(self) -> None:
        self.version += 1
        arrived = self.mine[: self.num_arrived]
        running = min(len(arrived) + len(self.others), CAPACITY)
        waiting = len(arrived) + len(self.others) - running
        tokens = sum(arrived) + sum(self.others)
        self.reports.append(
            Load(
                self.version,
                running,
                waiting,
                len(arrived),
                tokens,
                sum(arrived),
                used_blocks=7,
                num_blocks=100,
                accepting=not self.paused,
                share=CAPACITY - 1 if self.others else CAPACITY,
            )
        )


class RouterMachine(RuleBasedStateMachine):
    def __init__(self, policy: Policy = least_loaded) -> None:
        super().__init__()
        self.router = Router(policy)
        self.engines: dict[int, Engine] = {}
        self.cached: dict[int, int] = {}  # engine -> chunks of the one prompt that everybody sends
        self.homes: dict[str, int] = {}

    def engine(self, engine_id: int) -> Engine:
        return self.engines.get(engine_id, Engine())

    # --- what the engines do

    @rule(engine_id=ENGINES)
    def join(self, engine_id: int) -> None:
        if engine_id not in self.engines:
            self.engines[engine_id] = Engine()
            self.router.join(engine_id, CAPACITY)

    @rule(engine_id=ENGINES)
    def leave(self, engine_id: int) -> None:
        self.engines.pop(engine_id, None)
        self.cached.pop(engine_id, None)
        self.homes = {session: home for session, home in self.homes.items() if home != engine_id}
        self.router.leave(engine_id)

    @rule(engine_id=ENGINES, tokens=TOKENS, count=st.integers(1, CAPACITY))
    def another_client_sends(self, engine_id: int, tokens: int, count: int) -> None:
        self.engine(engine_id).others += [tokens] * count

    @rule(engine_id=ENGINES)
    def a_request_of_another_client_ends(self, engine_id: int) -> None:
        del self.engine(engine_id).others[:1]

    @rule(engine_id=ENGINES)
    def my_requests_arrive(self, engine_id: int) -> None:
        self.engine(engine_id).num_arrived = len(self.engine(engine_id).mine)

    @rule(engine_id=ENGINES, paused=st.booleans())
    def pause_or_resume(self, engine_id: int, paused: bool) -> None:
        self.engine(engine_id).paused = paused

    @rule(engine_id=ENGINES)
    def emit_a_report(self, engine_id: int) -> None:
        self.engine(engine_id).emit()

    @rule(engine_id=ENGINES, data=st.data())
    def a_report_arrives_in_any_order(self, engine_id: int, data: st.DataObject) -> None:
        engine = self.engine(engine_id)
        if engine.reports:
            load = engine.reports.pop(data.draw(st.integers(0, len(engine.reports) - 1)))
            if engine.known is None or load.version >= engine.known.version:
                engine.known = load
            self.router.report(engine_id, load, 0.0)

    # --- what this client does

    @rule(tokens=TOKENS, num_chunks=st.integers(0, 3), session=st.none() | st.sampled_from("ab"))
    def send(self, tokens: int, num_chunks: int, session: str | None) -> None:
        hashes = tuple(range(num_chunks))
        cached = self.router.cached_tokens(hashes)
        chunks = {engine_id: min(count, num_chunks) for engine_id, count in self.cached.items()}
        assert cached == {engine_id: count * CHUNK_TOKENS for engine_id, count in chunks.items() if count}
        home = self.router.home(session)
        assert home == (None if session is None else self.homes.get(session))
        request = RoutingRequest(tokens, 0, session, home, cached)
        decision = self.router.pick(request, 0.0)
        accepting = [i for i, engine in sorted(self.engines.items()) if engine.known is None or engine.known.accepting]
        eligible = [i for i in accepting if self.has_slot(self.engines[i])]
        if not eligible:  # all are full: then those where this client has less than its share
            eligible = [i for i in accepting if self.has_right(self.engines[i])]
        assert (decision is None) == (not eligible)
        if decision is None:
            return
        assert decision.engine_id in eligible
        assert decision.scores.keys() == self.engines.keys()
        self.check_choice(decision.engine_id, decision.scores, eligible, request)
        if session is not None:
            self.homes[session] = decision.engine_id
        self.engines[decision.engine_id].mine.append(tokens)
        self.router.sent(decision.engine_id, 1, tokens)

    @rule(count=st.integers(4, 4 * CAPACITY + 1))
    def burst(self, count: int) -> None:
        """Or engines would hardly ever all be full."""
        for _ in range(count):
            self.send(1, 0, None)

    def has_slot(self, engine: Engine) -> bool:
        known = engine.known
        others = 0 if known is None else known.running + known.waiting - known.mine
        return len(engine.mine) + others < CAPACITY

    def has_right(self, engine: Engine) -> bool:
        return engine.known is not None and len(engine.mine) < engine.known.share

    def check_choice(self, chosen: int, scores: dict[int, float], eligible: list[int], request: RoutingRequest) -> None:
        best = min(scores[engine_id] for engine_id in eligible)
        near = [engine_id for engine_id in eligible if scores[engine_id] <= best + self.slack(request)]
        assert chosen in near
        if request.home in near:
            assert chosen == request.home
        else:
            assert request.cached_tokens.get(chosen, 0) == max(request.cached_tokens.get(i, 0) for i in near)
            if not request.cached_tokens:
                assert scores[chosen] == best

    def slack(self, request: RoutingRequest) -> float:
        return 4

    @precondition(lambda self: any(engine.mine for engine in self.engines.values()))
    @rule(data=st.data())
    def a_request_of_mine_ends(self, data: st.DataObject) -> None:
        engine_id = data.draw(st.sampled_from([i for i, engine in sorted(self.engines.items()) if engine.mine]))
        engine = self.engines[engine_id]
        tokens = engine.mine.pop(0)
        engine.num_arrived = max(0, engine.num_arrived - 1)
        self.router.ended(engine_id, 1, tokens)

    @rule(engine_id=ENGINES, num_chunks=st.integers(0, 3))
    def a_first_token_comes(self, engine_id: int, num_chunks: int) -> None:
        self.router.computed(engine_id, tuple(range(num_chunks)))
        if engine_id in self.engines:
            self.cached[engine_id] = max(self.cached.get(engine_id, 0), num_chunks)

    @invariant()
    def the_table_says_what_is_known(self) -> None:
        loads = {load.engine_id: load for load in self.router.loads(0.0)}
        assert list(loads) == sorted(self.engines)
        for engine_id, engine in self.engines.items():
            load, known = loads[engine_id], engine.known or Load(0, 0, 0, 0, 0, 0, 0, 0)
            assert (load.mine, load.my_tokens) == (len(engine.mine), sum(engine.mine))
            assert load.others == known.running + known.waiting - known.mine >= 0
            assert load.other_tokens == known.tokens - known.my_tokens >= 0
            assert load.accepting == known.accepting


class TokenRouterMachine(RouterMachine):
    def __init__(self) -> None:
        super().__init__(least_tokens)

    def slack(self, request: RoutingRequest) -> float:
        return 4 * request.num_tokens


TestLeastLoaded = RouterMachine.TestCase
TestLeastTokens = TokenRouterMachine.TestCase
TestLeastLoaded.settings = TestLeastTokens.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
