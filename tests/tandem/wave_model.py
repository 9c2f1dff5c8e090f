"""All that can happen to a group of engines, its coordinator and its clients, around the real machines.

Messages between coordinator, engines and clients are never taken away: whatever was ever sent may arrive at any time,
in any order, and again. That it arrives at last shows where nothing else can happen. Requests themselves arrive once,
also late. A collective operation needs all engines of its generation; an engine in one does nothing else, and cannot
leave it but by death, or when it fails because another has left the generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from explorer import Explored, Violation, explore
from snapshots import Pool, Snapshot
from wave_reduction import Reduction, hear
from wave_world import Client, Disturbances, Engine, World

from asyncscale.tandem.client import ClientWaves
from asyncscale.tandem.coordinator import CoordinatorWaves
from asyncscale.tandem.engine import EngineWaves
from asyncscale.tandem.messages import GroupState

Next = Iterator[tuple[str, World]]


class WaveModel:
    """::

        WaveModel(num_engines=2, requests=((2,), (1,)), deaths=1).check()

    requests: of each client, the steps that each of its requests takes. holds, aborts, deaths (and returns), failures
    (of a collective operation, at some or all engines): how often they happen, at most, anywhere at any
    time. is_formed: the engines have met at the start. coordinator, engine, client: the machines, to check broken ones.
    forgets: see Reduction.
    """

    def __init__(
        self,
        requests: tuple[tuple[int, ...], ...],
        *,
        num_engines: int = 2,
        holds: int = 0,
        aborts: int = 0,
        deaths: int = 0,
        failures: int = 0,
        is_formed: bool = True,
        coordinator: type[CoordinatorWaves] = CoordinatorWaves,
        engine: type[EngineWaves] = EngineWaves,
        client: type[ClientWaves] = ClientWaves,
        sync_interval: int = 2,
        forgets: bool = True,
    ) -> None:
        self._requests = requests
        self._num_engines = num_engines
        self._disturbances = Disturbances(holds, aborts, deaths, failures)
        self._is_formed = is_formed
        self._sync_interval = sync_interval
        self._pool = Pool()
        self._reduction = Reduction(self._pool, forgets=forgets, with_deaths=deaths > 0)
        self._new_coordinator = coordinator(num_engines)
        self._new_engine = self._pool.take(engine(sync_interval))
        self._new_client = self._pool.take(client())
        num_requests = sum(map(len, requests))
        # A request may begin two: one by its client's word, and another if it then arrives too late.
        self._most_waves = 2 * num_requests + holds
        # In a wave: what there is to do, and after each request until all agree that it is done.
        self._most_steps = sum(map(sum, requests)) + sync_interval * (1 + num_requests)

    def check(self, max_states: int = 500_000) -> Explored:
        """Raises CounterExample."""
        explored = explore(self, max_states)
        self._reduction.check()
        return explored

    def start(self) -> World:
        """All engines have just become ready."""
        coordinator, sent = self._pool.take(self._new_coordinator), []
        for engine_id in range(self._num_engines):
            coordinator, state = coordinator.after("engine_joined", engine_id)
            sent += [] if state is None else [state]
        waves = self._new_engine
        if self._is_formed:
            waves, _ = waves.after("on_group_state", sent[-1])
            waves, _ = waves.after("joined", sent[-1].generation)
        return World(
            coordinator,
            tuple(sent),
            frozenset(),
            (Engine(waves),) * self._num_engines,
            tuple(Client(self._new_client, steps) for steps in self._requests),
            self._disturbances,
        )

    def canonical(self, world: World) -> World:
        return self._reduction.reduced(world)

    # --- what must never be, and what must be in the end

    def find_defect(self, world: World) -> str | None:
        coordinator = world.coordinator.machine
        state = coordinator.state
        if state.wave > self._most_waves:
            return "there are more waves than there is reason for"
        for number, engine in enumerate(world.engines):
            waves = engine.waves.machine
            if not waves.running:
                continue
            here, begun = (waves.generation, waves.wave), (state.generation, state.wave)
            if here > begun or (here == begun and state.whole and not state.running):
                return f"engine {number} steps in a wave that the coordinator has not begun"
            if waves.num_steps > self._most_steps:
                return f"engine {number} steps on though there is nothing to do"
            if coordinator.at_rest and waves.generation == state.generation:
                return f"engine {number} steps while the group is said to be at rest"
        return None

    def find_unfinished(self, world: World) -> str | None:
        for number, engine in enumerate(world.engines):
            if engine.doing is not None:
                return f"engine {number} is in a {engine.doing[0]} alone"
            if engine.waves.machine.running:
                return f"engine {number} does not pause"
            if engine.work or engine.inbox:
                return f"engine {number} has requests that nobody computes"
        if any(client.unsent for client in world.clients):
            return "a request is not sent"
        if not world.coordinator.machine.idle:
            return "the coordinator does not know that all are idle"
        return None

    # --- what may happen next

    def successors(self, world: World) -> Next:
        coordinator = world.coordinator.machine
        can_only_release = coordinator.state.held
        for following in self._all_but_release(world):
            can_only_release = False
            yield following
        if coordinator.state.held:
            if can_only_release and not coordinator.at_rest:
                raise Violation("nothing else can happen until it is released, and the group does not come to rest")
            yield "release", _coordinate(world, world.coordinator.after("release", "somebody"))

    def _all_but_release(self, world: World) -> Next:
        for number, client in enumerate(world.clients):
            yield from self._of_client(world, number, client)
        for number, engine in enumerate(world.engines):
            if engine.state == "dead":
                yield from self._of_dead_engine(world, number, engine)
            elif engine.state == "gone":
                back = world.with_engine(number, engine._replace(state="up", sees=world.sent[-1].version))
                yield f"engine {number} is back", _coordinate(back, world.coordinator.after("engine_joined", number))
            elif engine.doing is None:
                yield from self._of_free_engine(world, number, engine)
        for message in world.said:
            after = _coordinate(world, hear(world.coordinator, message))
            if after is not world:
                yield f"the coordinator gets {message}", after
        yield from self._of_disturbances(world)
        yield from self._of_collectives(world)

    def _of_client(self, world: World, number: int, client: Client) -> Next:
        """It sends a request, whatever it has got to know until then."""
        if not client.unsent:
            return
        for known in {client.waves, *(client.waves.after("on_group_state", state)[0] for state in world.sent)}:
            waves, wake = known.after("request_sent")
            if len(client.unsent) == 1:
                waves = self._new_client  # what it knows now will not matter, or can be got to know again
            after = world.with_client(number, Client(waves, client.unsent[1:]))
            after = after if wake is None else after._replace(said=after.said | {wake})
            for target, engine in enumerate(world.engines):
                if engine.state != "gone":
                    receiver = engine._replace(inbox=_sorted(*engine.inbox, client.unsent[0]))
                    label = f"client {number} sends a request to engine {target}, and {wake}"
                    yield label, after.with_engine(target, receiver)

    def _of_dead_engine(self, world: World, number: int, engine: Engine) -> Next:
        """Its requests go back to a client; to whichever, as they are alike but for what they know."""
        known = world.with_engine(number, Engine(self._new_engine, "gone"))
        known = _coordinate(known, world.coordinator.after("engine_died", number))
        requests = engine.work + engine.inbox
        for owner, client in enumerate(world.clients if requests else world.clients[:1]):
            back = Client(client.waves, client.unsent + requests)
            yield f"it is known that engine {number} is dead", known.with_client(owner, back)

    def _of_free_engine(self, world: World, number: int, engine: Engine) -> Next:
        machine = engine.waves.machine
        for state in world.sent:
            waves, _ = engine.waves.after("on_group_state", state)
            if state.version >= engine.sees and waves is not engine.waves:
                yield f"engine {number} gets {state}", world.with_engine(number, engine._replace(waves=waves))
        for steps in set(engine.inbox):
            receiver = engine._replace(inbox=_without(engine.inbox, steps), work=_sorted(*engine.work, steps))
            yield f"engine {number} gets a request of {steps} steps", world.with_engine(number, receiver)
        if machine.generation_to_join is not None:
            joining = engine._replace(doing=("join", machine.generation_to_join))
            yield f"engine {number} joins generation {machine.generation_to_join}", world.with_engine(number, joining)
        elif machine.running:
            yield f"engine {number} enters a step", world.with_engine(number, engine._replace(doing=("step", 0)))
        waves, report = engine.waves.after("report", bool(engine.work))
        if report is not None:
            teller = world.with_engine(number, engine._replace(waves=waves))
            yield f"engine {number} says {report}", teller._replace(said=world.said | {report})

    def _of_disturbances(self, world: World) -> Next:
        if world.left.holds and not world.coordinator.machine.state.held:
            yield "hold", _coordinate(world.without_one("holds"), world.coordinator.after("hold", "somebody"))
        for number, engine in enumerate(world.engines):
            if world.left.aborts:
                after = world.without_one("aborts")
                for steps in set(engine.inbox):
                    rest = engine._replace(inbox=_without(engine.inbox, steps))
                    yield f"a request is aborted before engine {number} gets it", after.with_engine(number, rest)
                for steps in set(engine.work) if engine.doing is None else ():
                    rest = engine._replace(work=_without(engine.work, steps))
                    yield f"a request of engine {number} is aborted", after.with_engine(number, rest)
            if world.left.deaths and engine.state == "up":
                yield f"engine {number} dies", self._kill(world, number)

    def _kill(self, world: World, number: int) -> World:
        dead = world.engines[number]._replace(state="dead", doing=None, waves=self._new_engine)
        return world.without_one("deaths").with_engine(number, dead)

    # --- collective operations

    def _of_collectives(self, world: World) -> Next:
        for number, engine in enumerate(world.engines):
            if engine.doing is not None and _fails(world, engine):
                yield f"the {engine.doing[0]} fails at engine {number}", _fail(world, [number])
        positions = {engine.position for engine in world.engines}
        if None in positions or len({engine.meeting_generation for engine in world.engines}) > 1:
            yield from self._of_timeouts(world)
        elif len(positions) > 1:
            raise Violation(f"engines are in different operations at once: {positions}")
        else:
            yield from self._of_meetings(world)

    def _of_timeouts(self, world: World) -> Next:
        if world.left.failures:
            after = world.without_one("failures")
            for number, engine in enumerate(world.engines):
                if engine.doing is not None:
                    yield f"engine {number} waits too long in a {engine.doing[0]}", _fail(after, [number])

    def _of_meetings(self, world: World) -> Next:
        """All engines are in one operation: it succeeds, or fails at some of them, perhaps as one of those dies."""
        doing = world.engines[0].doing
        assert doing is not None
        everybody = range(len(world.engines))
        yield f"all engines do their {doing[0]}", _complete(world, everybody)
        if not world.left.failures and not world.left.deaths:
            return
        for failed in _parts(everybody):
            passed = [number for number in everybody if number not in failed]
            after = _fail(_complete(world, passed), failed)
            label = f"the {doing[0]} fails at {failed}, not at {passed}"
            if world.left.failures:
                yield label, after.without_one("failures")
            if world.left.deaths:
                for victim in failed:
                    yield f"engine {victim} dies, and {label}", self._kill(after, victim)


def _coordinate(world: World, after: tuple[Snapshot, GroupState | None]) -> World:
    """The world after something has happened to the coordinator."""
    coordinator, state = after
    if coordinator is world.coordinator:
        return world
    machine = coordinator.machine
    if world.coordinator.machine.at_rest and machine.state.held and machine.state.running:
        raise Violation("a wave begins while the group is held")
    return world._replace(coordinator=coordinator, sent=world.sent if state is None else (*world.sent, state))


def _fails(world: World, engine: Engine) -> bool:
    """Whether the operation that it is in cannot be done: who meets is told so by the owner, who closes the store at
    which they meet; who computes has a connection to each of the others."""
    generation = engine.meeting_generation
    if engine.is_joining:
        state = world.coordinator.machine.state
        return not state.whole or state.generation != generation
    return not all(other.is_member(generation) for other in world.engines)


def _fail(world: World, numbers: Sequence[int]) -> World:
    """The operation that these engines are in fails for them."""
    for number in numbers:
        engine = world.engines[number]
        waves, _ = engine.waves.after("broke", engine.meeting_generation)
        world = world.with_engine(number, engine._replace(waves=waves, doing=None))
    return world


def _complete(world: World, numbers: Sequence[int]) -> World:
    """The operation that all are in is done, as far as these engines know."""
    go_on = any(engine.doing == ("agree", True) for engine in world.engines)
    for number in numbers:
        world = world.with_engine(number, _completed(world.engines[number], go_on))
    return world


def _completed(engine: Engine, go_on: bool) -> Engine:
    match engine.doing:
        case ("join", generation):
            waves, _ = engine.waves.after("joined", generation)
        case ("agree", _):
            waves, _ = engine.waves.after("agreed", go_on)
        case _:
            return _stepped(engine)
    return engine._replace(waves=waves, doing=None)


def _stepped(engine: Engine) -> Engine:
    """After a step an engine goes into the agreement at once, if there is one."""
    work = tuple(steps - 1 for steps in engine.work if steps > 1)
    waves, compares = engine.waves.after("step_done")
    doing = ("agree", waves.machine.vote(bool(work))) if compares else None
    return engine._replace(waves=waves, work=work, doing=doing)


def _sorted(*requests: int) -> tuple[int, ...]:
    return tuple(sorted(requests))


def _without(requests: tuple[int, ...], request: int) -> tuple[int, ...]:
    index = requests.index(request)
    return requests[:index] + requests[index + 1 :]


def _parts(numbers: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    for count in range(1, len(numbers) + 1):
        yield from combinations(numbers, count)
