"""The engines that a client reaches: connections to those that live, how the others died, which of them return."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence

import msgspec
import zmq

from asyncscale import messages
from asyncscale.client.connection import EngineConnection
from asyncscale.client.exceptions import fresh
from asyncscale.client.outages import Outages
from asyncscale.errors import EngineDeadError, EngineError

logger = logging.getLogger(__name__)

# What an engine that comes later must be told as well.
_MODES = frozenset({"pause", "drain", "resume"})

MessageCallback = Callable[[EngineConnection, messages.FromEngine | None], None]
LossCallback = Callable[[EngineConnection], None]


class Fleet:
    """A mapping of engine ids to the connections of those that take requests.

    ::

        fleet.join(member)
        if engine_id in fleet:
            fleet[engine_id].send(message)

    restart_timeout: seconds for which an engine that died and is to return is waited for. on_message, on_loss: see
    EngineConnection. on_hopeless: an engine was not back in time. deaths: of engines that are not back.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        identity: bytes,
        restart_timeout: float,
        on_message: MessageCallback,
        on_loss: LossCallback,
        on_hopeless: Callable[[], None],
    ) -> None:
        self._context = context
        self._identity = identity
        self._on_message = on_message
        self._on_loss = on_loss
        self._on_hopeless = on_hopeless
        self._connections: dict[int, EngineConnection] = {}
        self.deaths: dict[int, EngineDeadError] = {}
        self._outages = Outages(restart_timeout, self._on_outage_over)
        self._in_tandem = False  # each computes only when all are there
        self._watches_loads = False
        self._mode: str | None = None  # the newest of _MODES that the engines were called to
        self.last_death: EngineDeadError | None = None

    # --- who is there

    @property
    def engine_ids(self) -> tuple[int, ...]:
        """All engines, also those that died, in order."""
        return tuple(sorted({*self._connections, *self.deaths}))

    def __contains__(self, engine_id: int) -> bool:
        return engine_id in self._connections

    def __getitem__(self, engine_id: int) -> EngineConnection:
        return self._connections[engine_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._connections)

    def __len__(self) -> int:
        return len(self._connections)

    def join(self, member: messages.Member) -> None:
        """The engine takes requests from now on."""
        self._in_tandem = member.facts.in_tandem
        self._connect(member)
        self._outages.end(member.engine_id)
        self.deaths.pop(member.engine_id, None)

    def leave(self, error: EngineDeadError, *, returns: bool) -> EngineConnection | None:
        """The engine of `error` is dead. Its connection, when it had one: drained and closed.

        returns: it is started again. Said again, with another error or another `returns`, of an engine that has not
        come back.
        """
        engine_id = error.engine_id
        self.deaths[engine_id] = self.last_death = error
        if returns:
            self._outages.begin(error)
        else:
            self._outages.end(engine_id)
        connection = self._connections.pop(engine_id, None)
        if connection is not None:
            connection.drain()
            connection.close(error)
        return connection

    def reconnect(self, connection: EngineConnection) -> None:
        """The connection was lost, and its engine was not: it has dropped what this client had there."""
        engine_id = connection.engine_id
        logger.warning(
            "engine %d: the connection to it was lost; its requests are sent again",
            engine_id,
            extra={"engine_id": engine_id},
        )
        connection.close(EngineError(f"the connection to engine {engine_id} was lost", engine_id=engine_id))
        self._connect(connection.member)

    def _connect(self, member: messages.Member) -> None:
        connection = EngineConnection(self._context, self._identity, member, self._on_message, self._on_loss)
        self._connections[member.engine_id] = connection
        connection.connect(self._watches_loads)
        if self._mode is not None:
            connection.call(self._mode, [])  # it was not there when the others were told, or not to be reached

    def close(self, error: Exception) -> None:
        """Tell the engines that this client leaves, and close the connections."""
        for connection in self._connections.values():
            connection.leave()
            connection.close(error)
        self._connections.clear()
        self._outages.close()

    # --- who may come back

    def can_return(self, engine_id: int) -> bool:
        """Whether it makes sense to wait for this engine."""
        return engine_id in self._connections or engine_id in self._outages

    @property
    def is_hopeless(self) -> bool:
        """Whether all engines died, and none returns; in tandem, whether one does not."""
        if self._in_tandem:
            return any(engine_id not in self._outages for engine_id in self.deaths)
        return not self._connections and not self._outages and self.last_death is not None

    def check_hope(self, pinned_engine: int | None) -> None:
        """Raises the EngineDeadError of those engines that could have served a request, when none does or will."""
        if pinned_engine is None or self.is_hopeless:
            hope, error = not self.is_hopeless, self.last_death
        else:
            hope, error = self.can_return(pinned_engine), self.deaths.get(pinned_engine)
        if not hope and error is not None:
            raise fresh(error)

    def _on_outage_over(self, error: EngineDeadError) -> None:
        self.deaths[error.engine_id] = self.last_death = error
        self._on_hopeless()

    # --- what all of them are told

    def call(self, method: str, args: Sequence[msgspec.Raw]) -> Awaitable[list[messages.EngineResult]]:
        """Run a registered method on every engine that is connected now; results in engine order.

        The calls are sent before this returns: so calls reach all engines in the order in which they are made.
        """
        if method in _MODES:
            self._mode = method
        return asyncio.gather(*(connection.call(method, args) for _, connection in sorted(self._connections.items())))

    def watch_loads(self, watches: bool) -> None:
        """Be told each change of an engine's load, and everybody's share in it; or no longer."""
        self._watches_loads = watches
        for connection in self._connections.values():
            connection.connect(watches)
