"""Whole programs in processes of their own, as people write them, start them and kill them."""

from __future__ import annotations

import os
import signal
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import PRELUDE, assert_prints, run, script

# --- ways to start


UNGUARDED = """
with open(os.environ["IMPORTS"], "a") as imports:
    imports.write("x")
asyncio.run(three_tokens(), debug=sys.flags.dev_mode)
"""


@pytest.mark.parametrize(
    "flags", [[], ["-I"], ["-E", "-s"], ["-P"], ["-OO"], ["-X", "dev", "-W", "error"]], ids=" ".join
)
def test_a_script_without_a_main_guard_runs_once(workspace: Path, flags: list[str]) -> None:
    path = script(workspace, UNGUARDED)
    assert_prints("3\n", *flags, path, env={**os.environ, "IMPORTS": str(workspace / "imports")})
    assert (workspace / "imports").read_text() == "x"


def test_a_script_may_have_an_odd_path_or_none(workspace: Path) -> None:
    environment = {**os.environ, "IMPORTS": str(workspace / "imports")}
    path = script(workspace / "with spaces" / "ünïcode", UNGUARDED, "my script.v1.py")
    assert_prints("3\n", path, env=environment)
    assert_prints("3\n", "-c", PRELUDE + UNGUARDED, env=environment)
    assert_prints("3\n", "-", input=PRELUDE + UNGUARDED, env=environment)
    assert_prints("3\n", "-m", "module", cwd=Path(script(workspace, UNGUARDED, "module.py")).parent, env=environment)
    assert (workspace / "imports").read_text() == "xxxx"


def test_a_script_without_site_packages_shares_its_path_with_the_engines(workspace: Path) -> None:
    packages = [*site.getsitepackages(), str(Path(__file__).parents[2])]
    path = workspace / "script.py"
    path.write_text(f"import sys\nsys.path += {packages!r}\n{PRELUDE}\nasyncio.run(three_tokens())")
    assert_prints("3\n", "-S", str(path))


def test_asyncio_run_twice_uvloop_and_a_threads_own_loop(workspace: Path) -> None:
    path = script(
        workspace,
        """
        import logging, uvloop
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # which says in debug mode that a machine is busy
        asyncio.run(three_tokens())
        asyncio.run(three_tokens(), debug=True)
        uvloop.run(three_tokens())
        with asyncio.Runner(loop_factory=uvloop.new_event_loop, debug=True) as runner:
            runner.run(three_tokens())
            runner.run(three_tokens())
        threads = [threading.Thread(target=asyncio.run, args=(three_tokens(),)) for _ in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        """,
    )
    assert_prints("3\n" * 8, "-W", "error", path)


def test_the_folder_may_change_between_import_and_start(workspace: Path) -> None:
    path = script(workspace, "os.chdir(sys.argv[1])\nasyncio.run(three_tokens())")
    (workspace / "elsewhere").mkdir()
    assert_prints("3\n", "script.py", "elsewhere", cwd=Path(path).parent)


def test_the_folder_may_be_gone(workspace: Path) -> None:
    path = script(workspace, "os.mkdir('x'); os.chdir('x'); os.rmdir('../x')\nasyncio.run(three_tokens())")
    assert_prints("3\n", path, cwd=workspace)


def test_modules_in_the_current_folder_are_not_taken_for_those_of_the_standard_library(workspace: Path) -> None:
    path = script(workspace / "scripts", "asyncio.run(three_tokens())")
    for name in ("multiprocessing.py", "random.py", "selectors.py"):
        (workspace / name).write_text("raise SystemExit('a module of the user')")
    done = run(path, cwd=workspace)
    # stderr may hold what multiprocessing's resource tracker says, which looks in the current folder first.
    assert (done.stdout, done.returncode) == ("3\n", 0)


def test_a_client_under_pytest_in_a_project_of_its_own(workspace: Path) -> None:
    (workspace / "conftest.py").write_text("import sys\nsys.argv = ['nonsense']\n")
    (workspace / "test_it.py").write_text(PRELUDE + "def test_it():\n    asyncio.run(three_tokens())\n")
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "-W", "error", cwd=workspace)
    assert done.returncode == 0, done.stdout


# --- standard streams and signals of the owner's own making


@pytest.mark.parametrize("closed", [(0,), (2,), (0, 1, 2)])
def test_an_owner_whose_standard_streams_are_closed(workspace: Path, closed: tuple[int, ...]) -> None:
    path = script(
        workspace,
        """
        async def main():
            async with AsyncScaleClient(FAST, num_engines=2) as client:
                completion = await client.generate("x", max_tokens=3, ignore_eos=True)
                with open(sys.argv[1], "w") as out:
                    out.write(str(len(completion.token_ids)))
                if len(sys.argv) > 2:
                    os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
        """,
    )
    for how in ([], ["killed"]):
        shell = " ".join(f"{fd}>&-" for fd in closed)
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, path, str(workspace / "out"), *how], timeout=20
        )
        assert done.returncode == (-signal.SIGKILL if how else 0)
        assert (workspace / "out").read_text() == "3"
        (workspace / "out").unlink()


def test_an_owner_that_ignores_sigchld_or_reaps_all_children_itself(workspace: Path) -> None:
    path = script(
        workspace,
        """
        def reap(*_):
            try:
                while os.waitpid(-1, os.WNOHANG)[0]: pass
            except ChildProcessError: pass
        for handler in (signal.SIG_IGN, reap):
            signal.signal(signal.SIGCHLD, handler)
            asyncio.run(three_tokens())
        """,
    )
    assert_prints("3\n3\n", path)


# --- other processes of the user


WORKER = """
import multiprocessing
def work():
    asyncio.run(three_tokens())
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    if sys.argv[2] == "pool":
        with context.Pool(1) as pool:
            pool.apply(work)
    else:
        process = context.Process(target=work)
        process.start(); process.join()
        sys.exit(process.exitcode)
"""


@pytest.mark.parametrize(("method", "kind"), [("fork", "process"), ("spawn", "process"), ("fork", "pool")])
def test_a_client_inside_a_multiprocessing_worker(workspace: Path, method: str, kind: str) -> None:
    assert_prints("3\n", script(workspace, WORKER), method, kind)


# --- attached clients in processes of their own


ATTACHED = """
async def main():
    async with AsyncScaleClient.attach(sys.argv[1]) as client:
        print("ready", flush=True)
        try:
            await client.generate("x", max_tokens=8000, ignore_eos=True)
        except EngineDeadError as error:
            print("dead", flush=True)
asyncio.run(main())
"""
OWNER = """
async def main():
    async with AsyncScaleClient(SimulatedModel(base_ms=2), num_engines=2) as client:
        print(client.address, flush=True)
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(None, sys.stdin.readline):
            await asyncio.gather(*(client.generate("y", max_tokens=20, ignore_eos=True) for _ in range(100)))
            print([(load.running, load.waiting) for load in client.engine_loads()], flush=True)
asyncio.run(main())
"""


@pytest.fixture
def owner_and_attached(workspace: Path) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, script(workspace, OWNER, "owner.py")], **pipes) as owner:  # type: ignore[call-overload]
        address = owner.stdout.readline().strip()
        with subprocess.Popen([sys.executable, script(workspace, ATTACHED), address], **pipes) as attached:  # type: ignore[call-overload]
            assert attached.stdout.readline() == "ready\n"
            yield owner, attached
            for process in (attached, owner):
                process.kill()


def test_an_attached_client_ends_its_requests_when_the_owner_is_killed(
    owner_and_attached: tuple[subprocess.Popen[str], subprocess.Popen[str]],
) -> None:
    owner, attached = owner_and_attached
    owner.kill()
    output, _ = attached.communicate(timeout=10)
    assert (output, attached.returncode) == ("dead\n", 0)


def test_an_attached_client_that_is_stopped_and_then_killed_holds_up_nobody(
    owner_and_attached: tuple[subprocess.Popen[str], subprocess.Popen[str]],
) -> None:
    owner, attached = owner_and_attached
    assert owner.stdin is not None
    assert owner.stdout is not None
    for number in (signal.SIGSTOP, signal.SIGKILL):
        attached.send_signal(number)
        for _ in range(3):
            owner.stdin.write("\n")
            owner.stdin.flush()
            loads = owner.stdout.readline()
    assert loads == "[(0, 0), (0, 0)]\n"
    owner.communicate(timeout=10)
    assert owner.returncode == 0
