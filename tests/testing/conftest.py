"""Projects of somebody else, whose tests are run as a whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import asyncscale

INI = """
[pytest]
addopts = --strict-markers --strict-config -p asyncscale.testing -p no:cacheprovider -p no:hypothesispytest
filterwarnings = error
"""
LOOP_SCOPE = "asyncio_default_fixture_loop_scope = function\n"  # which pytest-asyncio wants to be said

RunPytest = Callable[..., pytest.RunResult]


@pytest.fixture
def run_pytest(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunPytest:
    """Run pytest, as a process, on files with these contents. Fails when engines or their folders are left.

    arguments: of the command line. files: by name without ".py". ini: further lines of the ini file.
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(asyncscale.__file__).parents[1]))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))

    def run(*arguments: str, ini: str = LOOP_SCOPE, **files: str) -> pytest.RunResult:
        pytester.makeini(INI + ini)
        pytester.makepyfile(**files)
        result = pytester.run(sys.executable, "-m", "pytest", *arguments, timeout=60)
        assert [path.name for path in folder.iterdir() if path.name.startswith("asyncscale-")] == []
        return result

    return run
