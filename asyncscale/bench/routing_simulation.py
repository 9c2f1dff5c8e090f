"""Where requests wait: many clients with the real router, on engines, messages and a clock that are simulated."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from asyncscale.client.policies import Policy, RoutingRequest, least_loaded, round_robin
from asyncscale.client.router import Router
from asyncscale.messages import Load

_STEP_S = 0.015  # of an engine of speed 1, whatever is in the step
_MEAN_OUTPUT_TOKENS = 100
_HOP_S = 0.0002  # between a client and an engine
_COUNTS_S = (0.0002, 0.002)  # from an engine, through the coordinator, to the other clients
_UNLIMITED = 10**9


@dataclass(frozen=True, slots=True)
class Scenario:
    """speeds: of the engines. rates: of the clients' arrivals, relative. occupancy: the work that arrives, over what
    the engines can do. burst: requests that arrive at once. capacity: most that run at once on one engine."""

    name: str
    speeds: tuple[float, ...]
    rates: tuple[float, ...]
    occupancy: float = 1.0
    burst: int = 1
    capacity: int = 16


@dataclass(frozen=True, slots=True)
class Strategy:
    """holds_back: requests stay at their client while every engine is full."""

    name: str
    policy: Policy
    holds_back: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """waiting_s: mean time for which a request waits for a slot. misplaced: the share of it at a full engine, while
    another engine has a free slot. held_beside_room: the share of it at a client, while an engine has a free slot of
    which the client has not heard yet. makespan_s: until all are done. latency_s: mean, from arrival to last token."""

    waiting_s: float
    misplaced: float
    held_beside_room: float
    makespan_s: float
    latency_s: float


SCENARIOS = (
    Scenario("engines 1:2:4, 4 clients", speeds=(1, 2, 4), rates=(8, 4, 2, 1)),
    Scenario("8 uneven clients, 4 engines", speeds=(1, 1, 1, 1), rates=(16, 8, 4, 2, 1, 1, 1, 1)),
    Scenario("bursts of 20, engines 1:2:4", speeds=(1, 2, 4), rates=(8, 4, 2, 1), burst=20),
    Scenario("120 % load, engines 1:2", speeds=(1, 2), rates=(3, 1), occupancy=1.2),
)
STRATEGIES = (
    Strategy("late binding", least_loaded, holds_back=True),
    Strategy("least count", least_loaded, holds_back=False),
    Strategy("round-robin", round_robin, holds_back=False),
)


def simulate(scenario: Scenario, strategy: Strategy, num_requests: int, seed: int) -> Outcome:
    """Run until `num_requests` are done. The same seed gives every strategy the same requests at the same times."""
    return _Simulation(scenario, strategy, num_requests, seed).run()


class _Clock:
    """Calls what is due, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), callback))

    def run(self, before_each: Callable[[float], None]) -> None:
        """before_each: is told the seconds since the last call."""
        while self._events:
            due, _, callback = heapq.heappop(self._events)
            before_each(due - self.now)
            self.now = due
            callback()


@dataclass(slots=True, eq=False)
class _Request:
    client: _Client
    arrived_at: float
    tokens_left: int


class _Engine:
    """Admits between two steps; each step is one token for every running request."""

    def __init__(self, simulation: _Simulation, engine_id: int, speed: float) -> None:
        self._simulation = simulation
        self._engine_id = engine_id
        self._step_s = _STEP_S / speed
        self._capacity = simulation.scenario.capacity
        self._inbox: list[_Request] = []
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._stepping = False
        self._version = 0

    @property
    def num_aboard(self) -> int:
        return len(self._inbox) + len(self._waiting) + len(self._running)

    def receive(self, request: _Request) -> None:
        self._inbox.append(request)
        if not self._stepping:
            self._begin_step()

    def _begin_step(self) -> None:
        num_new = len(self._inbox)
        self._waiting.extend(self._inbox)
        self._inbox.clear()
        while self._waiting and len(self._running) < self._capacity:
            self._running.append(self._waiting.popleft())
        if num_new:
            self._report([])
        self._stepping = bool(self._running)
        if self._stepping:
            self._simulation.clock.call_later(self._step_s, self._end_step)

    def _end_step(self) -> None:
        for request in self._running:
            request.tokens_left -= 1
        finished = [request for request in self._running if request.tokens_left == 0]
        if finished:
            self._running = [request for request in self._running if request.tokens_left > 0]
            self._report(finished)
        self._begin_step()

    def _report(self, finished: list[_Request]) -> None:
        """The counts, to each client: with the endings of its own requests, if there are any."""
        self._version += 1
        aboard = Counter(request.client for request in (*self._waiting, *self._running))
        for client in self._simulation.clients:
            load = Load(
                self._version,
                len(self._running),
                len(self._waiting),
                mine=aboard[client],
                tokens=0,
                my_tokens=0,
                used_blocks=0,
                num_blocks=0,
                share=self._capacity // (len(aboard) + (client not in aboard)),
            )
            own = [request for request in finished if request.client is client]
            self._simulation.tell(client, self._engine_id, load, own)


class _Client:
    """Holds requests back as the dispatcher does."""

    def __init__(self, simulation: _Simulation) -> None:
        self._simulation = simulation
        self._router = Router(simulation.strategy.policy, first_turn=len(simulation.clients))
        self._held: deque[_Request] = deque()
        for engine_id in range(len(simulation.scenario.speeds)):
            self._router.join(engine_id, simulation.scenario.capacity if simulation.strategy.holds_back else _UNLIMITED)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def submit(self, request: _Request) -> None:
        self._held.append(request)
        self._dispatch()

    def hear(self, engine_id: int, load: Load, finished: Sequence[_Request]) -> None:
        self._router.ended(engine_id, len(finished))
        self._router.report(engine_id, load, self._simulation.clock.now)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._held:
            decision = self._router.pick(RoutingRequest(num_prompt_tokens=1), self._simulation.clock.now)
            if decision is None:
                return
            self._router.sent(decision.engine_id)
            self._simulation.send(decision.engine_id, self._held.popleft())


class _Simulation:
    def __init__(self, scenario: Scenario, strategy: Strategy, num_requests: int, seed: int) -> None:
        self.scenario = scenario
        self.strategy = strategy
        self.clock = _Clock()
        self.engines = [_Engine(self, engine_id, speed) for engine_id, speed in enumerate(scenario.speeds)]
        self.clients: list[_Client] = []
        for _ in scenario.rates:
            self.clients.append(_Client(self))
        self._num_requests = num_requests
        self._delays = random.Random(f"delays {seed}")
        self._latencies: list[float] = []
        self._waiting = self._misplaced = self._held_beside_room = 0.0
        self._schedule_arrivals(random.Random(f"arrivals {seed}"))

    def run(self) -> Outcome:
        self.clock.run(self._account)
        if len(self._latencies) != self._num_requests:
            raise RuntimeError(f"{self._num_requests - len(self._latencies)} simulated requests were lost")
        waiting = self._waiting or 1.0
        return Outcome(
            waiting_s=self._waiting / self._num_requests,
            misplaced=self._misplaced / waiting,
            held_beside_room=self._held_beside_room / waiting,
            makespan_s=self.clock.now,
            latency_s=sum(self._latencies) / self._num_requests,
        )

    def send(self, engine_id: int, request: _Request) -> None:
        self.clock.call_later(_HOP_S, partial(self.engines[engine_id].receive, request))

    def tell(self, client: _Client, engine_id: int, load: Load, finished: list[_Request]) -> None:
        delay = _HOP_S if finished else self._delays.uniform(*_COUNTS_S)
        self._latencies += [self.clock.now + delay - request.arrived_at for request in finished]
        self.clock.call_later(delay, partial(client.hear, engine_id, load, finished))

    def _schedule_arrivals(self, rng: random.Random) -> None:
        """A Poisson process of bursts, each at a client drawn by its rate."""
        scenario = self.scenario
        slots_per_s = scenario.capacity * sum(scenario.speeds) / (_STEP_S * _MEAN_OUTPUT_TOKENS)
        bursts_per_s = scenario.occupancy * slots_per_s / scenario.burst
        at = 0.0
        for index in range(self._num_requests):
            if index % scenario.burst == 0:
                at += rng.expovariate(bursts_per_s)
                client = rng.choices(self.clients, scenario.rates)[0]
            request = _Request(client, at, 1 + int(rng.expovariate(1 / _MEAN_OUTPUT_TOKENS)))
            self.clock.call_later(at, partial(client.submit, request))

    def _account(self, seconds: float) -> None:
        """Who waited where since the last event. Slots that wait for the next step to begin are not free."""
        held = sum(client.num_held for client in self.clients)
        surpluses = [engine.num_aboard - self.scenario.capacity for engine in self.engines]
        excess = sum(surplus for surplus in surpluses if surplus > 0)
        room = -sum(surplus for surplus in surpluses if surplus < 0)
        misplaced = min(excess, room)
        self._waiting += seconds * (held + excess)
        self._misplaced += seconds * misplaced
        self._held_beside_room += seconds * min(held, room - misplaced)
