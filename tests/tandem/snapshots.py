"""State machines as values: to be compared, kept, and asked again and again what would happen next."""

from __future__ import annotations

from typing import Any

Event = tuple[str, tuple[Any, ...]]


class Pool:
    """Machines that stay as they are; equal ones are the same `Snapshot`."""

    def __init__(self) -> None:
        self._snapshots: dict[object, Snapshot] = {}

    def take(self, machine: Any) -> Snapshot:
        """As it is now; it must not be changed any more."""
        values = tuple(frozenset(x) if isinstance(x, set) else x for x in _fields(machine).values())
        key = type(machine), values
        if key not in self._snapshots:
            self._snapshots[key] = Snapshot(machine, self)
        return self._snapshots[key]

    def of(self, kind: type) -> list[Snapshot]:
        """All that were taken of this kind."""
        return [snapshot for snapshot in self._snapshots.values() if isinstance(snapshot.machine, kind)]


class Snapshot:
    """A machine at one moment; what happens to it yields another. machine: to read."""

    __slots__ = ("_pool", "futures", "machine")

    def __init__(self, machine: Any, pool: Pool) -> None:
        self.machine = machine
        self._pool = pool
        self.futures: dict[Event, tuple[Snapshot, Any]] = {}  # those that were asked for

    def after(self, event: str, *args: object) -> tuple[Snapshot, Any]:
        """The machine after a call of this method, and what that returned."""
        key = (event, args)
        if key not in self.futures:
            machine = self._copy()
            result = getattr(machine, event)(*args)
            self.futures[key] = self._pool.take(machine), result
        return self.futures[key]

    def having(self, **fields: object) -> Snapshot:
        """The machine with other values in these fields."""
        machine = self._copy()
        for name, value in fields.items():
            setattr(machine, name, value)
        return self._pool.take(machine)

    def _copy(self) -> Any:
        copy = object.__new__(type(self.machine))
        for name, value in _fields(self.machine).items():
            setattr(copy, name, set(value) if isinstance(value, set) else value)
        return copy


def _fields(machine: Any) -> dict[str, Any]:
    slots = [name for kind in type(machine).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(machine, name) for name in slots} or dict(vars(machine))
