from __future__ import annotations

import os
from pathlib import Path

import pytest

from asyncscale.cpus import Cpu, UsableCpus, usable_cpus


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a machine with two sockets of two cores of two threads each, of which this process may use five."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 1, 2, 5, 6}, raising=False)
    for number in range(8):
        core = number % 4
        write(tmp_path, f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list", f"{core},{core + 4}\n")
        write(tmp_path, f"sys/devices/system/cpu/cpu{number}/node{core // 2}/cpulist", "")
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_the_cpus_are_those_of_the_affinity_mask_with_their_cores_and_nodes(system: Path) -> None:
    usable = usable_cpus(system)
    assert usable == UsableCpus((Cpu(1, 1, 0), Cpu(2, 2, 1), Cpu(5, 1, 0), Cpu(6, 2, 1), Cpu(7, 3, 1)))
    assert usable.num_cores == 3


def test_where_the_system_tells_nothing_each_cpu_is_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3}, raising=False)
    assert usable_cpus(tmp_path) == UsableCpus((Cpu(0, 0), Cpu(3, 3)))
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert usable_cpus(tmp_path) == UsableCpus((Cpu(0, 0), Cpu(1, 1)))


def test_siblings_may_be_a_range(system: Path) -> None:
    for number in range(8):
        first = number // 2 * 2
        write(system, f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list", f"{first}-{first + 1}\n")
    assert [cpu.core for cpu in usable_cpus(system).cpus] == [0, 2, 4, 6, 6]


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000", "cpu.max": "400000 100000"}, 2.0),
        ("0::/of/the/host", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/a", {"unified/a/cpu.max": "300000 100000"}, 3.0),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, 2.5),
        ("4:cpuset:/\n0::/", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {"cpu.max": "nonsense"}, None),
        ("0::/", {"cpu.max": ""}, None),
    ],
)
def test_the_least_quota_of_the_control_groups_counts(
    system: Path, membership: str, files: dict[str, str], quota: float | None
) -> None:
    write(system, "proc/self/cgroup", membership + "\n")
    for path, text in files.items():
        write(system, f"sys/fs/cgroup/{path}", text + "\n")
    assert usable_cpus(system).quota == quota


@pytest.mark.parametrize(("quota", "num_cores"), [(None, 3), (8.0, 3), (2.9, 2), (1.5, 1), (0.2, 1)])
def test_a_quota_is_rounded_down_to_cores(quota: float | None, num_cores: int) -> None:
    assert UsableCpus(tuple(Cpu(number, number) for number in range(3)), quota).num_cores == num_cores
