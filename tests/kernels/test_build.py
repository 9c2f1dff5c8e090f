"""Building the kernels: watched by sanitizers; without a compiler; and what is loaded when none were built."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from asyncscale.kernels import library

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "asyncscale" / "kernels"
BEST = library.load_library()


def test_without_a_compiler_the_build_succeeds_and_says_what_is_left_out(tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:  # not imported here: it minds a distutils that is there already
        pytest.skip("needs setuptools")
    compilers = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | compilers, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'building extension "asyncscale.kernels._kernels_portable" failed' in result.stdout + result.stderr
    assert list(tmp_path.rglob("_kernels*")) == []


def test_a_library_that_was_not_built_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    assert library.load_library() is None


def test_a_library_that_is_broken_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if BEST is None:
        pytest.skip("the kernels were not built")
    for path in Path(library.__file__).parent.glob("_kernels_*.so"):
        shutil.copy(path, tmp_path)
        if f"_kernels_{BEST.isa}." in path.name:
            (tmp_path / path.name).write_bytes(b"not a library")
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    found = library.load_library()
    assert found is None or found.isa != BEST.isa


def test_a_build_leaves_the_libraries_beside_their_sources_too(tmp_path: Path) -> None:
    """Where `python -m asyncscale` in the source tree finds them: it imports that tree, not what was installed."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools")
    shutil.copy(ROOT / "setup.py", tmp_path)
    sources = tmp_path / "asyncscale" / "kernels"
    shutil.copytree(ROOT / "asyncscale" / "kernels", sources, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho built > "$2"\n')
    compiler.chmod(0o755)
    compilers = {"CC": str(compiler), "CXX": str(compiler), "LDSHARED": str(compiler), "LDCXXSHARED": str(compiler)}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | compilers, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    built = {path.name for path in (tmp_path / "lib").rglob("_kernels_*.so")}
    assert any("portable" in name for name in built)
    assert {path.name for path in sources.glob("_kernels_*.so")} == built
