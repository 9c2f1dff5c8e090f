"""The walls between the parts: who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import asyncscale

PACKAGE = Path(asyncscale.__file__).parent


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside functions, but not only for type checking."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(*parts: str) -> list[Path]:
    found = [
        path
        for part in parts
        for path in ([PACKAGE / part] if part.endswith(".py") else (PACKAGE / part).rglob("*.py"))
    ]
    assert found
    return found


def violations(paths: list[Path], *forbidden: str) -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in paths
        for name in imports(path)
        if any(name == module or name.startswith(module + ".") for module in forbidden)
    ]


def test_engine_and_model_never_import_asyncio_or_the_client() -> None:
    assert violations(files("engine", "model"), "asyncio", "uvloop", "asyncscale.client", "asyncscale.bench") == []


def test_the_client_knows_the_engine_only_by_its_entry_point() -> None:
    known = violations(files("client"), "asyncscale.engine", "asyncscale.model")
    # New weights are checked before any engine hears of them; what that needs is imported then.
    entries = ("engine.process.run_engine", "client/weight_updates.py imports asyncscale.model.weights.find_update")
    assert [violation for violation in known if not violation.endswith(entries)] == []


def test_decisions_do_no_io() -> None:
    pure = files(
        "client/affinity.py",
        "client/policies.py",
        "client/router.py",
        "client/choice.py",
        "client/stream.py",
        "client/live_requests.py",
        "client/intake.py",
        "engine/core.py",
        "engine/scheduler.py",
        "engine/block_pool.py",
        "messages.py",
        "params.py",
        "tandem/client.py",
        "tandem/coordinator.py",
        "tandem/core.py",
        "tandem/engine.py",
        "tandem/messages.py",
    )
    assert violations(pure, "zmq", "socket", "subprocess", "multiprocessing", "threading", "os") == []


def test_waves_know_neither_engine_nor_client() -> None:
    waves = files(
        "tandem/client.py", "tandem/coordinator.py", "tandem/core.py", "tandem/engine.py", "tandem/messages.py"
    )
    others = ("asyncio", "torch", "asyncscale.engine", "asyncscale.client", "asyncscale.model")
    assert violations(waves, *others) == []


def test_only_what_is_named_after_it_imports_torch() -> None:
    torch = {*(PACKAGE / "model").glob("torch_*.py"), PACKAGE / "tandem" / "torch_group.py"}
    torch |= {PACKAGE / "model" / name for name in ("expert_parcels.py", "native_exchange.py")}  # rows for TorchGroup
    others = [path for path in PACKAGE.rglob("*.py") if path not in torch]
    assert violations(others, "torch", "transformers") == []


def test_the_library_never_imports_transformers() -> None:
    assert violations(files("."), "transformers") == []


def test_nothing_is_unpickled_but_what_a_caller_and_its_own_front_ends_tell_each_other() -> None:
    # A function of the user's can reach a fresh process in no other way. Both ends of that pipe are the user's own,
    # nobody else can write to it; and nothing that comes over a socket or out of a file passes this door.
    door = PACKAGE / "client" / "pickling.py"
    others = [path for path in files(".") if path != door]
    assert violations(others, "pickle", "cloudpickle", "dill", "marshal", "shelve") == []
    users = violations(others, "asyncscale.client.pickling")
    assert sorted(users) == [
        "client/frontend_process.py imports asyncscale.client.pickling",
        "client/frontends.py imports asyncscale.client.pickling",
    ]


EVALUATING = {
    "eval", "exec", "compile", "__import__", "execfile", "load_module", "torch.load", "torch.hub", "np.load",
    "numpy.load", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pydoc.locate", "jinja2.Template",
    "jinja2.Environment",
}  # fmt: skip


def test_nothing_is_evaluated_and_no_shell_is_asked() -> None:
    assert violations(files("."), "yaml", "code", "codeop", "runpy", "imp", "commands", "joblib", "jsonpickle") == []
    found = []
    for path in files("."):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in EVALUATING:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle", "trust_remote_code"):
                found.append(f"{path.relative_to(PACKAGE)}:{node.value.lineno} {node.arg}=")
    assert found == []


def imported_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter has imported after `statement`, and had not before."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_asyncscale_imports_nothing_else_but_small_parts_of_the_standard_library() -> None:
    imported = imported_by("import asyncscale")
    others = {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}
    assert others == {"asyncscale"}
    assert imported.isdisjoint({"asyncio", "multiprocessing", "ssl", "socket", "logging", "subprocess", "inspect"})


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "from asyncscale import AsyncScaleClient",
            "torch transformers tokenizers huggingface_hub jinja2 gguf cloudpickle tqdm numpy",
        ),
        ("import asyncscale.engine.process", "torch transformers asyncio uvloop tokenizers numpy"),
        ("import asyncscale.model.runner", "torch transformers asyncio uvloop tokenizers"),
        ("import asyncscale.checkpoint.model_config", "torch gguf numpy"),
    ],
)
def test_importing_stays_light(statement: str, absent: str) -> None:
    assert imported_by(statement) & set(absent.split()) == set()
