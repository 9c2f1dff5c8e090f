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


# The narrowest vectors, and those and the products of this CPU.
FLAGS = {"portable": "", "best": "-march=native"}
# All that is undefined but for what the addresses' own checks see, and which takes a quarter of the compiler's time.
UNDEFINED = ("address,undefined", "-fno-sanitize=null,alignment,object-size")


def compile_watched(sanitizers: str, flags: str, sources: list[Path], program: Path) -> subprocess.Popen[str]:
    options = ["-std=c++20", "-w", "-O0", "-ffp-contract=fast", "-fno-sanitize-recover=all", "-pthread"]
    command = ["g++", *options, f"-fsanitize={sanitizers}", f"-I{SOURCES}", *flags.split(), "-o", str(program)]
    return subprocess.Popen([*command, *map(str, sources)], stderr=subprocess.PIPE, text=True)


def run_watched(compiler: subprocess.Popen[str], program: Path) -> None:
    _, errors = compiler.communicate()
    if "cannot find -l" in errors or "cannot find lib" in errors:
        pytest.skip("needs the sanitizers' libraries")
    assert compiler.returncode == 0, errors
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[subprocess.Popen[str], Path]]:
    """The kernels with sanitizers and each of FLAGS; all compilers at once, as each takes seven seconds."""
    if shutil.which("g++") is None or not SOURCES.exists():
        pytest.skip("needs g++ and the sources")
    folder = tmp_path_factory.mktemp("watched")
    sources = [Path(__file__).with_name("sanitized.cpp"), SOURCES / "decoder.cpp", SOURCES / "sampling.cpp"]
    return {
        name: (compile_watched(UNDEFINED[0], f"{UNDEFINED[1]} {flags}", sources, folder / name), folder / name)
        for name, flags in FLAGS.items()
    }


@pytest.mark.parametrize("name", FLAGS)
def test_no_byte_beyond_the_buffers_is_touched_and_nothing_is_undefined(
    name: str, watched: dict[str, tuple[subprocess.Popen[str], Path]]
) -> None:
    run_watched(*watched[name])


def test_threads_of_a_team_do_not_race(tmp_path: Path) -> None:
    if shutil.which("g++") is None or not SOURCES.exists():
        pytest.skip("needs g++ and the sources")
    source = Path(__file__).with_name("team.cpp")
    run_watched(compile_watched("thread", "", [source], tmp_path / "run"), tmp_path / "run")


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


def test_a_library_of_other_sources_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if BEST is None:
        pytest.skip("the kernels were not built")
    monkeypatch.setattr(library, "_STRUCTURES", (library.Model, library.Layer, library.Cache, library.Step))
    assert library.load_library(BEST.isa) is None
    assert f"_kernels_{BEST.isa}." in caplog.text
    assert "was built from other sources: build it again" in caplog.text


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
