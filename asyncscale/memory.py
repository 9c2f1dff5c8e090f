"""How much memory is free."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory() -> int:
    """Bytes of main memory that can still be allocated, within the limits of the process's control groups."""
    return min(_system_memory(), *_cgroup_memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def _system_memory() -> int:
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: the pages that are free, else half of all
        page = os.sysconf("SC_PAGE_SIZE")
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            return page * os.sysconf("SC_AVPHYS_PAGES")
        return page * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_memory(membership: Path, root: Path) -> list[int]:
    """What is left under each limit above this process (version 2, then 1 of cgroups); at least one (large) number."""
    left = [2**63 - 1]
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            left += _left_upwards(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            left += _left_upwards(root / "memory", path, *files)
    return left


def _left_upwards(root: Path, path: str, limit_file: str, usage_file: str, reclaimable: str) -> list[int]:
    # In a container the path may be the host's; its own group is then mounted at the root.
    folder = root / path.lstrip("/")
    return [
        left
        for group in (folder, *folder.parents)
        if group.is_relative_to(root) and (left := _left(group, limit_file, usage_file, reclaimable)) is not None
    ]


def _left(group: Path, limit_file: str, usage_file: str, reclaimable: str) -> int | None:
    try:
        limit = (group / limit_file).read_text().strip()
        usage = int((group / usage_file).read_text())
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - usage + int(stat.get(reclaimable, "0")), 0)
