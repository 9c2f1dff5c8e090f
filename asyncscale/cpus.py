"""The CPUs that this process may use: which, how they hang together, and how much of their time.

Sources: sched_getaffinity(2); https://www.kernel.org/doc/Documentation/ABI/stable/sysfs-devices-system-cpu;
https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files and, for version 1,
https://docs.kernel.org/scheduler/sched-bwc.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Cpu:
    """One CPU of the system.

    core: the least CPU of its physical core, whose hardware threads share the arithmetic units.
    node: of memory (NUMA).
    """

    id: int
    core: int
    node: int = 0


@dataclass(frozen=True, slots=True)
class UsableCpus:
    """What a process may use.

    cpus: those that it may run on, in the order of their ids.
    quota: so many CPUs' worth of time, on whichever of them, where a control group says so; else None.
    """

    cpus: tuple[Cpu, ...]
    quota: float | None = None

    @property
    def num_cores(self) -> int:
        """How many threads can compute at full speed: physical cores, less what the quota takes away; at least one."""
        cores = len({cpu.core for cpu in self.cpus})
        return cores if self.quota is None else max(1, min(cores, int(self.quota)))


def usable_cpus(root: Path = Path("/")) -> UsableCpus:
    """Of this process, now. root: where /sys and /proc are."""
    if not hasattr(os, "sched_getaffinity"):
        return UsableCpus(tuple(Cpu(number, number) for number in range(os.cpu_count() or 1)))
    cpus = tuple(_describe(number, root) for number in sorted(os.sched_getaffinity(0)))
    return UsableCpus(cpus, min(_quotas(root), default=None))


def _describe(number: int, root: Path) -> Cpu:
    folder = root / f"sys/devices/system/cpu/cpu{number}"
    siblings = _read(folder / "topology/thread_siblings_list").replace("-", ",").split(",")  # "0,64", "0-1" or ""
    nodes = [path.name.removeprefix("node") for path in folder.glob("node[0-9]*")]
    return Cpu(number, _number(siblings[0], number), _number(nodes[0] if nodes else "", 0))


def _quotas(root: Path) -> Iterator[float]:
    """In CPUs: of each control group above this process that has one."""
    mounted = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for folder in (*_groups(mounted, path), *_groups(mounted / "unified", path)):
                yield from _quotient(*_read(folder / "cpu.max").split())
        elif "cpu" in controllers.split(","):
            for folder in _groups(mounted / "cpu", path):
                yield from _quotient(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _groups(mounted: Path, path: str) -> list[Path]:
    # In a container the path may be the host's; its own group is then mounted at the root.
    folder = mounted / path.lstrip("/")
    return [group for group in (folder, *folder.parents) if group.is_relative_to(mounted)]


def _quotient(quota: str = "", period: str = "") -> Iterator[float]:
    """Nothing where there is no limit: "max" in version 2, -1 in version 1."""
    if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf8").strip()
    except OSError:
        return ""


def _number(text: str, default: int) -> int:
    return int(text) if text.isdecimal() else default
