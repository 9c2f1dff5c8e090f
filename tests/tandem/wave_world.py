"""A group of engines, its coordinator and its clients at one moment, as values."""

from __future__ import annotations

from typing import NamedTuple

from snapshots import Snapshot

from asyncscale.tandem.messages import FromTandemEngine, GroupState, Wake

Message = FromTandemEngine | Wake  # to the coordinator


class Engine(NamedTuple):
    """state: "dead" becomes "gone" when that is known, and then it may be started again. doing: the collective
    operation that it is in, and its vote or the generation to join. work, inbox: requests, as the steps that they still
    take. sees: the version of the first GroupState that its life can see."""

    waves: Snapshot
    state: str = "up"
    doing: tuple[str, int] | None = None
    work: tuple[int, ...] = ()
    inbox: tuple[int, ...] = ()
    sees: int = 0

    @property
    def known_version(self) -> int:
        """Of the newest GroupState that it has got."""
        return self.waves.machine._group.version  # type: ignore[no-any-return]

    @property
    def is_joining(self) -> bool:
        return self.doing is not None and self.doing[0] == "join"

    @property
    def meeting_generation(self) -> int:
        """Of the collective operation that it is in."""
        if self.doing is not None and self.doing[0] == "join":
            return self.doing[1]
        return self.waves.machine.generation  # type: ignore[no-any-return]

    @property
    def position(self) -> tuple[object, ...] | None:
        """Which collective operation it is in: what all who take part must agree on."""
        if self.doing is None:
            return None
        waves = self.waves.machine
        if self.is_joining:
            return ("join", self.meeting_generation)
        return (self.doing[0], waves.generation, waves.wave, waves.num_steps)

    def is_member(self, generation: int) -> bool:
        """Whether it computes with the others of this generation, or would."""
        waves = self.waves.machine
        return self.state == "up" and waves.generation == generation and waves._is_whole and not self.is_joining


class Client(NamedTuple):
    """unsent: the steps that each request takes."""

    waves: Snapshot
    unsent: tuple[int, ...]


class Disturbances(NamedTuple):
    """How often each may still happen."""

    holds: int
    aborts: int
    deaths: int
    failures: int


class World(NamedTuple):
    """sent: by the coordinator, to engines and clients. said: to it."""

    coordinator: Snapshot
    sent: tuple[GroupState, ...]
    said: frozenset[Message]
    engines: tuple[Engine, ...]
    clients: tuple[Client, ...]
    left: Disturbances

    def with_engine(self, number: int, engine: Engine) -> World:
        return self._replace(engines=(*self.engines[:number], engine, *self.engines[number + 1 :]))

    def with_client(self, number: int, client: Client) -> World:
        return self._replace(clients=(*self.clients[:number], client, *self.clients[number + 1 :]))

    def without_one(self, disturbance: str) -> World:
        """One of these has happened."""
        return self._replace(left=self.left._replace(**{disturbance: getattr(self.left, disturbance) - 1}))
