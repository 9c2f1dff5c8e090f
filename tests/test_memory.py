"""Free memory, within the limits of control groups laid out as Linux does."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncscale.memory import _cgroup_memory, available_memory

MIB = 2**20


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def _group(folder: Path, limit: str, usage: int, inactive: int = 0, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    name = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{name} {inactive}\n")


def test_the_tightest_limit_above_the_process_counts(tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "fs"
    membership.write_text("0::/pods/one\n")
    _group(root / "pods", str(300 * MIB), 250 * MIB)
    _group(root / "pods" / "one", "max", 200 * MIB)
    _group(root / "pods" / "two", str(MIB), 0)
    assert min(_cgroup_memory(membership, root)) == 50 * MIB


def test_file_pages_that_can_be_dropped_count_as_free(tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "fs"
    membership.write_text("0::/\n")
    _group(root, str(300 * MIB), 250 * MIB, inactive=100 * MIB)
    assert min(_cgroup_memory(membership, root)) == 150 * MIB


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "fs"
    membership.write_text("0::/docker/0123abc\n")
    _group(root, str(300 * MIB), 100 * MIB)
    assert min(_cgroup_memory(membership, root)) == 200 * MIB


def test_version_1_is_read(tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "fs"
    membership.write_text("5:cpu:/a\n4:memory:/a\n")
    _group(root / "memory" / "a", str(300 * MIB), 100 * MIB, inactive=MIB, version=1)
    assert min(_cgroup_memory(membership, root)) == 201 * MIB


def test_a_group_beyond_its_limit_has_nothing_left(tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "fs"
    membership.write_text("0::/\n")
    _group(root, str(MIB), 2 * MIB)
    assert min(_cgroup_memory(membership, root)) == 0


def test_without_control_groups_only_the_system_counts(tmp_path: Path) -> None:
    assert len(_cgroup_memory(tmp_path / "none", tmp_path)) == 1
    assert MIB < available_memory() < 2**50
