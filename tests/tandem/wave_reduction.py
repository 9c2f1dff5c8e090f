"""Which worlds need not be told apart."""

from __future__ import annotations

from snapshots import Pool, Snapshot
from wave_world import Client, Engine, Message, World

from asyncscale.tandem.coordinator import CoordinatorWaves
from asyncscale.tandem.engine import EngineWaves
from asyncscale.tandem.messages import Broken, GroupState, Wake


class Reduction:
    """::

        world = reduction.reduced(world)  # the same for all worlds in which the same may happen
        reduction.check()  # at the end, that this is true

    Engines are alike, and so are clients: their order is of no account. And without effect are messages that are stale,
    and what a machine overwrites before it reads it again. That holds for right machines only, so `check` looks at all
    that were reached; wrong ones are to be explored with forgets=False.
    """

    def __init__(self, pool: Pool, *, forgets: bool, with_deaths: bool) -> None:
        self._pool = pool
        self._forgets = forgets
        self._with_deaths = with_deaths
        self._numbers: dict[Engine | Client, int] = {}
        self._engines: dict[Engine, Engine] = {}
        self._said: dict[tuple[Snapshot, frozenset[Message]], frozenset[Message]] = {}
        self._states: set[GroupState] = set()  # that were ever sent, in any world
        self._messages: set[Message] = set()  # that were ever said, in any world

    def reduced(self, world: World) -> World:
        coordinator, sent, said, engines, clients, left = world
        if self._forgets:
            sent = self._not_known_to_all(world)
            said = self._not_stale(world)
            engines = tuple(self._without_unused(engine) for engine in engines)
        engines = tuple(sorted(engines, key=self._number))
        if self._with_deaths:
            engines = tuple(sorted(engines, key=lambda engine: engine.state == "gone"))
            living = {number for number, engine in enumerate(engines) if engine.state != "gone"}
            if coordinator.machine._engines != living:
                coordinator = coordinator.having(_engines=living)
        return World(coordinator, sent, said, engines, tuple(sorted(clients, key=self._number)), left)

    def _number(self, part: Engine | Client) -> int:
        return self._numbers.setdefault(part, len(self._numbers))

    def _not_known_to_all(self, world: World) -> tuple[GroupState, ...]:
        """The GroupStates that are newer than what some engine knows, and the newest, which newcomers are sent.

        A client that has got one of the others acts as one that has got none: it says nothing, or something stale.
        """
        known = [max(engine.known_version, engine.sees - 1) for engine in world.engines if engine.state == "up"]
        oldest, newest = min(known, default=0), world.sent[-1]
        return tuple(state for state in world.sent if state.version > oldest or state is newest)

    def _not_stale(self, world: World) -> frozenset[Message]:
        key = world.coordinator, world.said
        if key not in self._said:
            self._messages |= world.said
            self._states.update(world.sent)
            self._said[key] = frozenset(m for m in world.said if not _is_stale(m, world.coordinator))
        return self._said[key]

    def _without_unused(self, engine: Engine) -> Engine:
        if engine not in self._engines:
            sees = 0 if engine.known_version >= engine.sees else engine.sees
            self._engines[engine] = engine._replace(sees=sees, waves=_without_unused(engine.waves))
        return self._engines[engine]

    def check(self) -> None:
        """Raises AssertionError if something was left out that has an effect on the machine that gets or holds it."""
        for engine in self._pool.of(EngineWaves):
            for state in self._states:
                if state.version <= engine.machine._group.version:
                    assert engine.after("on_group_state", state)[0] is engine
            reduced = _without_unused(engine)
            for (event, args), (following, result) in list(engine.futures.items()):
                same_following, same_result = reduced.after(event, *args)
                assert same_result == result
                assert _without_unused(same_following) is _without_unused(following)
        for coordinator in self._pool.of(CoordinatorWaves):
            for message in self._messages:
                if _is_stale(message, coordinator):
                    assert all(_is_stale(message, following) for following, _ in list(coordinator.futures.values()))


def hear(coordinator: Snapshot, message: Message) -> tuple[Snapshot, GroupState | None]:
    """The coordinator after it got this message, and what it sends then."""
    return coordinator.after("on_wake" if isinstance(message, Wake) else "on_report", message)


def _is_stale(message: Message, coordinator: Snapshot) -> bool:
    """Whether it does nothing, and is not of a wave to come."""
    state = coordinator.machine.state
    wave = state.wave if isinstance(message, Broken) else message.wave
    is_past = (message.generation, wave) <= (state.generation, state.wave)
    return is_past and hear(coordinator, message)[0] is coordinator


def _without_unused(waves: Snapshot) -> Snapshot:
    """An engine's machine, with one value for all that it overwrites before it uses them again."""
    machine = waves.machine
    unused: dict[str, object] = {}
    if not machine.running:
        unused |= {"num_steps": 0, "_next_sync": 1}
    if not machine._is_whole:
        unused |= {"wave": 0, "_told": (0, 0, False)}
    return waves.having(**unused)
