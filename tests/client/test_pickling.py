"""What front ends and their callers send each other, taken to bits and put together again."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncscale import EngineDeadError, FrontendError
from asyncscale.client import pickling


class KeywordError(Exception):
    def __init__(self, code: int, *, why: str) -> None:
        super().__init__(f"{why} ({code})")
        self.code = code
        self.why = why


class FileTroubleError(FileNotFoundError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "gone", path)
        self.path = path


class MixedError(KeywordError, ValueError):
    pass


class ReducedError(Exception):
    """It has a way of its own, which is kept to."""

    def __init__(self, code: int) -> None:
        super().__init__("text")
        self.code = code
        self.is_rebuilt = False

    def __reduce__(self) -> tuple[Any, ...]:
        return ReducedError, (self.code,), {"is_rebuilt": True}


@pytest.mark.parametrize(
    "error",
    [
        KeyError("k"),
        OSError(2, "gone", "/nowhere"),
        UnicodeDecodeError("utf8", b"\xff", 0, 1, "bad"),
        ImportError("no", name="module", path="/path"),
        KeywordError(7, why="because"),
        MixedError(7, why="because"),
        FileTroubleError("/nowhere"),
        FrontendError("inner", index=4, exit_code=1),
        EngineDeadError("died", engine_id=1, exit_code=-9, stderr_tail="tail"),
        pytest.fail.Exception("a BaseException"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_comes_back_as_it_was_alone_and_in_a_group(error: BaseException) -> None:
    error.add_note("a note")
    alone = pickling.loads(pickling.dumps(error))
    group = pickling.loads(pickling.dumps(BaseExceptionGroup("several", [error])))
    for back in (alone, group.exceptions[0]):
        assert type(back) is type(error)
        assert (str(back), back.args, vars(back)) == (str(error), error.args, vars(error))
        for name in ("errno", "filename", "start", "reason", "name", "path"):
            assert getattr(back, name, None) == getattr(error, name, None)


def test_an_exception_with_a_reduction_of_its_own_is_rebuilt_by_it() -> None:
    back = pickling.loads(pickling.dumps(ReducedError(5)))
    assert (back.code, back.args, back.is_rebuilt) == (5, ("text",), True)


LOAD = "import sys; from asyncscale.client import pickling; print(pickling.loads(sys.stdin.buffer.read())())"


@pytest.fixture
def load_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Loads a module's source from a file, under a name by which only this process has it."""

    def load(name: str, source: str) -> Any:
        path = tmp_path / "module.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("name", ["only_here", "asyncscale.only_here", "json.decoder.only_here", "json.tool"])
def test_a_function_of_a_module_that_others_cannot_import_takes_along_what_it_needs(
    name: str, load_module: Callable[..., Any]
) -> None:
    module = load_module(name, "NUMBER = 5\ndef inner(): return NUMBER\ndef outer(): return inner()\n")
    data = pickling.dumps_function(module.outer)
    done = subprocess.run([sys.executable, "-c", LOAD], input=data, capture_output=True, check=True)
    assert done.stdout == b"5\n"


def test_a_class_that_went_away_and_returns_is_the_same_and_unchanged(load_module: Callable[..., Any]) -> None:
    source = "NUMBER = 5\nclass Kind:\n    'text'\n    count = None\n    def number(self): return NUMBER\n"
    module = load_module("only_here", source + "def make(): return Kind()\n")
    number = module.Kind.number
    away = (
        "import sys; from asyncscale.client import pickling; value = pickling.loads(sys.stdin.buffer.read())();"
        "assert type(value).__doc__ == 'text' and value.number() == 5; type(value).count = 1;"
        "sys.stdout.buffer.write(pickling.dumps(value))"
    )
    data = pickling.dumps_function(module.make)
    done = subprocess.run([sys.executable, "-c", away], input=data, capture_output=True, check=True)
    back = pickling.loads(done.stdout)
    assert type(back) is module.Kind
    assert module.Kind.number is number
    assert module.Kind.count is None


def test_a_function_that_others_can_import_is_sent_by_its_name() -> None:
    data = pickling.dumps_function(os.path.join)
    assert len(data) < 100
    assert pickling.loads(data) is os.path.join
