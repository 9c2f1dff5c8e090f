"""How the plugin comes into a pytest run, what it costs there, and how its engines are chosen."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import asyncscale

from .conftest import LOOP_SCOPE, RunPytest

AUTO = LOOP_SCOPE + "asyncio_mode = auto\n"
CHECKOUT = Path(__file__).parents[2]

TRIVIAL = """
async def test_answer(asyncscale_client):
    assert (await asyncscale_client.generate("x", max_tokens=3)).token_ids
"""

SHOWN = """
async def test_shown(asyncscale_client, asyncscale_engines):
    assert asyncscale_client.address == asyncscale_engines == asyncscale_engines.address
    loads = asyncscale_client.engine_loads()
    print("shown:", len(loads), loads[0].capacity)
"""


def test_the_plugin_imports_nothing_but_small_parts_of_the_standard_library() -> None:
    code = "import sys, pytest; before = set(sys.modules); import asyncscale.testing; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names} == {
        "asyncscale",
        "asyncscale.testing",
        "asyncscale.testing.fixtures",
        "asyncscale.testing.hooks",
        "asyncscale.testing.loops",
        "asyncscale.testing.settings",
    }
    assert imported.isdisjoint({"asyncio", "multiprocessing", "socket", "ssl", "subprocess", "unittest", "logging"})


def test_a_run_without_its_fixtures_imports_no_more_and_starts_nothing(run_pytest: RunPytest) -> None:
    result = run_pytest(
        "-p", "no:asyncio", "-p", "no:anyio",
        ini="",
        conftest="""
            import sys, threading

            def pytest_unconfigure(config):
                loaded = [name for name in ("zmq", "uvloop", "asyncscale.client.client") if name in sys.modules]
                print("loaded:", loaded, threading.active_count())
        """,
        test_nothing="def test_nothing(): pass",
    )  # fmt: skip
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines("loaded: [[][]] 1")


@pytest.mark.parametrize("arguments", [(), ("-p", "asyncscale.testing"), ("-p", "asyncscale")])
def test_the_installed_plugin_is_there_however_it_is_asked_for(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    install(pytester.path / "site", monkeypatch)
    pytester.makeconftest("pytest_plugins = ['asyncscale.testing']")
    result = pytester.run(sys.executable, "-m", "pytest", "--fixtures", *arguments, timeout=60)
    result.stdout.fnmatch_lines(["asyncscale_engines [[]session scope[]]*", "asyncscale_client_factory *"])


def test_plugins_that_are_named_one_by_one_work_together(
    run_pytest: RunPytest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    anyio = TRIVIAL.replace("async def", "import pytest\n\n@pytest.mark.anyio\nasync def")
    result = run_pytest("-p", "pytest_asyncio.plugin", "-p", "anyio.pytest_plugin", ini=AUTO, test_asyncio=TRIVIAL)
    result.assert_outcomes(passed=1)
    run_pytest("-p", "anyio.pytest_plugin", ini="", test_anyio=anyio, test_asyncio="").assert_outcomes(passed=1)


def test_the_installed_plugin_can_be_left_out(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    install(pytester.path / "site", monkeypatch)
    result = pytester.run(sys.executable, "-m", "pytest", "-p", "no:asyncscale", "--help", timeout=60)
    assert "asyncscale" not in result.stdout.str()


def install(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the package's entry points where Python looks for those of installed ones."""
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    metadata = site / "asyncscale-0.0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: asyncscale\nVersion: 0.0.0\n")
    entry_points = setup["options.entry_points"]["pytest11"]
    (metadata / "entry_points.txt").write_text(f"[pytest11]{entry_points}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(Path(asyncscale.__file__).parents[1])]))


def test_a_marker_goes_before_a_flag_and_that_before_the_ini_file(run_pytest: RunPytest) -> None:
    result = run_pytest(
        "-s",
        "--asyncscale-num-engines=2",
        "--asyncscale-option=max_num_seqs=5",
        ini=AUTO + "asyncscale_num_engines = 3\nasyncscale_options =\n    max_num_seqs=4\n    hang_timeout=null\n",
        test_configured=SHOWN,
        test_marked="import pytest\npytestmark = pytest.mark.asyncscale(num_engines=1)\n" + SHOWN,
        test_twice_marked=f"""
import pytest
pytestmark = pytest.mark.asyncscale(num_engines=1, max_num_seqs=6)

@pytest.mark.asyncscale(max_num_seqs=7)
class TestMarked:
    {SHOWN.replace("(", "(self, ", 1).replace(chr(10), chr(10) + "    ")}
""",
    )
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*shown: 2 5", "*shown: 1 5", "*shown: 1 7"])


def test_a_marker_reaches_fixtures_of_every_scope(run_pytest: RunPytest) -> None:
    result = run_pytest(
        ini=AUTO,
        test_scopes="""
            import pytest

            @pytest.fixture(scope="session")
            def server(asyncscale_engines):
                return asyncscale_engines

            async def test_default(asyncscale_client, server):
                assert asyncscale_client.address == server

            @pytest.mark.parametrize("_", range(2))
            @pytest.mark.asyncscale(max_num_seqs=2)
            async def test_marked(asyncscale_client, server, _):
                assert (asyncscale_client.address, asyncscale_client.engine_loads()[0].capacity) == (server, 2)
        """,
    )
    result.assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("arguments", "ini", "message"),
    [
        (["--asyncscale-num-engines=0"], "", "num_engines must be \"auto\" or an integer of at least 1, got 0"),
        (["--asyncscale-option=max_num_seq=5"], "", "did you mean 'max_num_seqs'?"),
        ([], "asyncscale_options = max_num_seqs 5", "asyncscale_options: expected KEY=VALUE, such as max_num_seqs=8"),
        ([], "asyncscale_options = max_num_seqs=many", "max_num_seqs must be an integer, got"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_end_the_run_before_it_begins(
    pytester: pytest.Pytester, arguments: list[str], ini: str, message: str
) -> None:
    pytester.makeini(f"[pytest]\n{LOOP_SCOPE}{ini}\n")
    with pytest.raises(pytest.UsageError, match=re.escape(message)):
        pytester.parseconfigure("-p", "asyncscale.testing", *arguments)


def test_of_a_marker_that_cannot_be_the_test_fails(run_pytest: RunPytest) -> None:
    marked = f"import pytest\n@pytest.mark.asyncscale({{}})\n{TRIVIAL.strip()}\n"
    result = run_pytest(ini=AUTO, test_one=marked.format("'simulated'"), test_two=marked.format("num_engine=2"))
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines("mark.asyncscale takes keyword arguments, such as num_engines=2, got ('simulated',)")
    result.stdout.fnmatch_lines("mark.asyncscale: *no option 'num_engine'*")
