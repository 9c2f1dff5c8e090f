"""Which engine computes on which CPUs, and with how many threads: a pure function of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TypeVar

from asyncscale.cpus import Cpu, UsableCpus

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Of one engine. cpus: where it runs; empty: wherever the system puts it. num_threads: how many compute at once."""

    cpus: tuple[int, ...]
    num_threads: int


def place_engines(
    usable: UsableCpus, num_engines: int, threads_per_engine: int | None = None, pin: bool = True
) -> tuple[Place, ...]:
    """A place for each engine. No CPU is in two of them, and none is left over.

    An engine gets whole physical cores of one memory node, as far as there are enough of them; and one thread for each
    core, because a core's second hardware thread adds little to arithmetic (it is there for everything else).

    Engines are bound to no CPUs where there is nothing to divide: one engine, or fewer CPUs than engines, or fewer CPUs
    than threads. Nor under a quota below the number of CPUs: then others have their time on the same CPUs, and all
    containers of a host would meet on the first of them.
    """
    in_full = usable.quota is None or usable.quota >= len(usable.cpus)
    if not in_full or num_engines == 1 or num_engines > len(usable.cpus):
        counts = [len(part) for part in _split(range(usable.num_cores), num_engines)]
        return tuple(Place((), threads_per_engine or max(count, 1)) for count in counts)
    shares = _shares(usable.cpus, num_engines)
    pin = pin and all(len(share) >= (threads_per_engine or 1) for share in shares)
    return tuple(
        Place(tuple(cpu.id for cpu in share) if pin else (), threads_per_engine or len({cpu.core for cpu in share}))
        for share in shares
    )


def _shares(cpus: Sequence[Cpu], num_engines: int) -> list[list[Cpu]]:
    """All the CPUs, divided over at most as many engines; neighbours stay together."""
    in_order = sorted(cpus, key=attrgetter("node", "core", "id"))
    nodes = [list(group) for _, group in groupby(in_order, attrgetter("node"))]
    if num_engines <= len(nodes):
        return [[cpu for node in part for cpu in node] for part in _split(nodes, num_engines)]
    counts = [1] * len(nodes)
    for _ in range(num_engines - len(nodes)):  # the next one goes where there is most room for it
        roomiest = max(range(len(nodes)), key=lambda i: len(nodes[i]) / counts[i])
        counts[roomiest] += 1
    return [share for node, count in zip(nodes, counts, strict=True) for share in _shares_of_node(node, count)]


def _shares_of_node(cpus: list[Cpu], num_engines: int) -> list[list[Cpu]]:
    cores = [list(group) for _, group in groupby(cpus, attrgetter("core"))]
    if num_engines > len(cores):
        return _split(cpus, num_engines)
    return [[cpu for core in part for cpu in core] for part in _split(cores, num_engines)]


def _split(items: Sequence[T], num_parts: int) -> list[list[T]]:
    """Parts of neighbours, whose sizes differ by one at most; longer ones first."""
    size, num_longer = divmod(len(items), num_parts)
    ends = [size * (i + 1) + min(i + 1, num_longer) for i in range(num_parts)]
    return [list(items[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
