"""How programs end: signals, exceptions, exits, clients that nobody closed.

Quietly, at once, with the exit code that is theirs, and with nothing left: the fixtures look for processes and folders.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import wait_until
from programs import assert_prints, processes_of, run, script, signalled

INT, TERM, HUP, QUIT, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL

# What asyncio, Python, multiprocessing and zmq say of things that were not ended as they should.
NOISE = (
    "Task was destroyed",
    "Exception ignored",
    "never awaited",
    "never retrieved",
    "resource_tracker",
    "spawn_main",
    "Fatal Python error",
    "Assertion failed",
)

STREAM = """
import uvloop
async def main():
    print("start", flush=True)
    async with AsyncScaleClient(SimulatedModel(load_s=float(sys.argv[1])), num_engines=2) as client:
        print("ready", flush=True)
        async for token in client.generate("x", max_tokens=8000, ignore_eos=True):
            pass
{asyncio, uvloop}[sys.argv[2]].run(main())
""".replace("{asyncio, uvloop}", "dict(asyncio=asyncio, uvloop=uvloop)")
FRONT_ENDS = """
async def stream(client, index):
    generation = client.generate("x", max_tokens=8000, ignore_eos=True)
    if index == 0:
        async for loads in client.watch_loads():
            if sum(load.running for load in loads) == 2:
                print("ready", flush=True)
                break
    while True:
        await generation
        generation = client.generate("x", max_tokens=8000, ignore_eos=True)
async def main():
    async with AsyncScaleClient(FAST, num_engines=2) as client:
        await run_frontends(stream, 2, client.address)
asyncio.run(main())
"""
CLOSING = """
async def main():
    client = await AsyncScaleClient(SimulatedModel(base_ms=2), num_engines=2).start()
    generations = [client.generate("x", max_tokens=8000, ignore_eos=True) for _ in range(10)]
    print("ready", flush=True)
    await client.close(drain=sys.argv[1] == "drain")
    await asyncio.Event().wait()
asyncio.run(main())
"""


def assert_quiet(stderr: str) -> None:
    assert [noise for noise in NOISE if noise in stderr] == []


# --- signals


@pytest.mark.parametrize("runner", ["asyncio", "uvloop"])
def test_ctrl_c_while_engines_start_is_the_owners_affair_alone(workspace: Path, runner: str) -> None:
    path = script(workspace, STREAM)
    for delay in (0.0, 0.05, 0.1, 0.15, 0.2, 0.6):
        code, _, stderr = signalled(path, "60", runner, line="start", delay=delay, sent=[INT])
        assert code == -INT
        assert stderr.strip().endswith("KeyboardInterrupt")
        assert_quiet(stderr)


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("body", [STREAM, FRONT_ENDS, CLOSING], ids=["streaming", "front ends", "closing"])
def test_ctrl_c_while_tokens_stream(workspace: Path, body: str, times: int) -> None:
    arguments = {STREAM: ["0", "asyncio"], CLOSING: ["drain"]}.get(body, [])
    path = script(workspace, body)
    code, _, stderr = signalled(path, *arguments, line="ready", delay=0.1, gap=0.05, sent=[INT] * times)
    assert code == -INT
    # A later signal may meet the interpreter's own exit, which names it with a colon.
    assert stderr.strip().splitlines()[-1].startswith("KeyboardInterrupt")
    assert_quiet(stderr)


@pytest.mark.parametrize("group", [True, False], ids=["group", "owner"])
@pytest.mark.parametrize("number", [TERM, HUP, QUIT, KILL])
@pytest.mark.parametrize(("line", "load_s"), [("start", "60"), ("ready", "0")], ids=["loading", "streaming"])
def test_an_owner_that_is_killed_leaves_nothing(
    workspace: Path, line: str, load_s: str, number: signal.Signals, group: bool
) -> None:
    if number == KILL and group:
        pytest.skip("nobody is left to clean up")
    path = script(workspace, STREAM)
    for delay in (0.0, 0.03, 0.1, 0.2, 0.6) if line == "start" else (0.1,):
        code, _, stderr = signalled(path, load_s, "asyncio", line=line, delay=delay, group=group, sent=[number])
        assert (code, stderr) == (-number, "")


# Kills the program from within, at a given step of its first engine's start.
KILLED_EARLY = """
from asyncscale import transport
from asyncscale.client import coordinator, spawn, supervisor
from multiprocessing import util
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def then_kill(do, when=lambda *_: True):
    def both(*arguments):
        done = do(*arguments)
        if when(*arguments):
            kill()
        return done
    return both
{patch}
asyncio.run(three_tokens())
"""


@pytest.mark.parametrize(
    "patch",
    [
        "util.spawnv_passfds = then_kill(util.spawnv_passfds, lambda _, words, __: '--multiprocessing-fork' in words)",
        "transport.make_runtime_folder = then_kill(transport.make_runtime_folder)",
        "supervisor.progress.make_file = kill",
        "transport.bind_router = kill",
    ],
    ids=["its process is there", "there is a folder", "a file is missing", "the coordinator is missing"],
)
def test_an_owner_that_is_killed_in_the_first_moments_of_an_engine_leaves_nothing(workspace: Path, patch: str) -> None:
    done = run(script(workspace, KILLED_EARLY.format(patch=patch)))
    assert (done.returncode, done.stdout, done.stderr) == (-KILL, "", "")


@pytest.mark.parametrize("number", [TERM, HUP, KILL])
def test_an_owner_of_front_ends_that_is_killed_leaves_nothing(workspace: Path, number: signal.Signals) -> None:
    code, _, stderr = signalled(script(workspace, FRONT_ENDS), line="ready", group=False, sent=[number])
    assert code == -number
    assert_quiet(stderr)


@pytest.mark.parametrize("how", ["drain", "at once"])
@pytest.mark.parametrize("number", [TERM, KILL])
def test_an_owner_that_is_killed_while_it_closes_leaves_nothing(
    workspace: Path, number: signal.Signals, how: str
) -> None:
    code, _, stderr = signalled(script(workspace, CLOSING), how, line="ready", group=False, sent=[number])
    assert (code, stderr) == (-number, "")


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("runner", ["asyncio", "uvloop"])
def test_a_program_that_handles_sigterm_itself_ends_as_it_likes(workspace: Path, runner: str, times: int) -> None:
    body = f"""
    import uvloop
    async def main():
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        async with AsyncScaleClient(SimulatedModel(base_ms=2), num_engines=2) as client:
            generations = [client.generate("x", max_tokens=100, ignore_eos=True) for _ in range(10)]
            print("ready", flush=True)
            await stop.wait()
            await client.close()
            print({{len((await generation).token_ids) for generation in generations}})
    {runner}.run(main())
    """
    assert signalled(script(workspace, body), line="ready", sent=[TERM] * times) == (0, "{100}\n", "")


def test_after_ctrl_z_and_fg_everything_goes_on(workspace: Path, runtime_folders: Path) -> None:
    body = """
    async def main():
        async with AsyncScaleClient(SimulatedModel(base_ms=2), num_engines=2, hang_timeout=1) as client:
            print("ready", flush=True)
            generations = [client.generate("x", max_tokens=300, ignore_eos=True) for _ in range(10)]
            print([len((await generation).token_ids) for generation in generations] == [300] * 10)
            print([engine.restarts for engine in client.health()])
    asyncio.run(main())
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, script(workspace, body)]
    with subprocess.Popen(command, start_new_session=True, **pipes) as program:  # type: ignore[call-overload]
        assert program.stdout.readline() == "ready\n"
        for _ in range(3):
            # The real SIGTSTP is discarded in a group without a shell, as POSIX has it.
            os.killpg(program.pid, signal.SIGSTOP)
            wait_until(
                lambda: {process.status() for process in processes_of(runtime_folders)} <= {psutil.STATUS_STOPPED},
                "all are stopped",
            )
            os.killpg(program.pid, signal.SIGCONT)
        assert program.communicate(timeout=20) == ("True\n[0, 0]\n", "")


# --- exceptions and exits


@pytest.mark.parametrize(
    "error",
    [
        "ZeroDivisionError()",
        "asyncio.CancelledError()",
        "KeyboardInterrupt()",
        "SystemExit(7)",
        "GeneratorExit()",
        "BaseExceptionGroup('', [KeyboardInterrupt()])",
    ],
)
def test_an_exception_inside_async_with_arrives_as_it_is(workspace: Path, error: str) -> None:
    body = f"""
    async def main():
        raised = {error}
        try:
            async with AsyncScaleClient(FAST, num_engines=1) as client:
                generation = client.generate("x", max_tokens=8000, ignore_eos=True)
                raise raised
        except BaseException as error:
            print(error is raised, error.__context__, error.__cause__, generation.done)
    asyncio.run(main())
    """
    assert_prints("True None None True\n", script(workspace, body))


def test_a_failing_sibling_and_a_timeout_around_async_with(workspace: Path) -> None:
    body = """
    async def stream():
        async with AsyncScaleClient(FAST, num_engines=1) as client:
            print("ready")
            await client.generate("x", max_tokens=8000, ignore_eos=True)
    async def fail():
        await asyncio.sleep(float(sys.argv[1]))
        raise ZeroDivisionError
    async def main():
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(stream()), group.create_task(fail())
        except* ZeroDivisionError:
            print("failed")
        try:
            async with asyncio.timeout(float(sys.argv[1])):
                await stream()
        except TimeoutError:
            print("timeout")
    asyncio.run(main())
    """
    path = script(workspace, body)
    assert_prints("failed\ntimeout\n", path, "0.05")
    assert_prints("ready\nfailed\nready\ntimeout\n", path, "0.9")


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(3)", 3), ("raise ZeroDivisionError", 1), ("os._exit(4)", 4)]
)
@pytest.mark.parametrize("closed", [True, False])
def test_a_program_that_just_ends_takes_its_engines_with_it(workspace: Path, closed: bool, end: str, code: int) -> None:
    start = "async with AsyncScaleClient(FAST, num_engines=2) as client:"
    if not closed:
        start = "global client, generation; client = await AsyncScaleClient(FAST, num_engines=2).start()\n    if True:"
    body = (
        f"\nasync def main():\n    {start}\n"
        "        generation = client.generate('x', max_tokens=8000, ignore_eos=True)\n"
        f"        async for token in generation:\n            break\n        {end}\n"
        "asyncio.run(main())\n"
    )
    done = run(script(workspace, body))
    assert done.returncode == code
    assert done.stderr.strip().splitlines()[-1:] == (["ZeroDivisionError"] if code == 1 else [])
    assert done.stderr.count("Traceback") == (code == 1)


def test_an_exit_while_a_daemon_threads_loop_runs_the_client(workspace: Path) -> None:
    body = """
    async def main():
        async with AsyncScaleClient(FAST, num_engines=2) as client:
            streaming.set()
            while True:
                await client.generate("x", max_tokens=8000, ignore_eos=True)
    streaming = threading.Event()
    threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
    streaming.wait()
    print("bye")
    """
    assert_prints("bye\n", script(workspace, body))


def test_a_program_may_close_its_client_in_an_atexit_handler(workspace: Path) -> None:
    body = """
    import atexit
    runner = asyncio.Runner()
    client = runner.run(AsyncScaleClient(FAST, num_engines=2).start())
    @atexit.register
    def end():
        runner.run(client.close())
        runner.close()
        print("closed")
    """
    assert_prints("closed\n", "-X", "dev", "-W", "error", script(workspace, body))


# --- clients that nobody closes


FORGOTTEN = """
import psutil, warnings
warnings.simplefilter("always", ResourceWarning)
async def start():
    return await AsyncScaleClient(FAST, num_engines=2).start()
def is_engine(child):
    try:
        return "spawn_main" in " ".join(child.cmdline())
    except psutil.ZombieProcess:
        return True
def num_children():
    return sum(map(is_engine, psutil.Process().children()))
async def wait_alone():
    while num_children():
        await asyncio.sleep(0.01)
    print("alone")
"""


@pytest.mark.parametrize("where", ["here", "in a thread", "in a cycle", "with its loop closed"])
def test_a_forgotten_client_ends_its_engines_and_warns(workspace: Path, where: str) -> None:
    forget = {
        "here": "del client",
        "in a thread": "gc.disable(); cycle = [client]; cycle.append(cycle); del client, cycle"
        "; await asyncio.to_thread(gc.collect)",
        "in a cycle": "client.me = client; del client; gc.collect()",
        "with its loop closed": "",
    }[where]
    body = f"""
async def main():
    client = await start()
    print(num_children())
    {forget}
    {"return client" if not forget else "await wait_alone()"}
client = asyncio.run(main())
del client
gc.collect()
print(num_children(), os.listdir(os.environ["TMPDIR"]))
"""
    done = run(script(workspace, FORGOTTEN + body))
    assert done.stdout == "2\n" + ("alone\n" if forget else "") + "0 ['user']\n"
    assert done.stderr.count("ResourceWarning: unclosed client") == done.stderr.count("Warning") == 1
    assert done.returncode == 0


def test_a_client_that_is_forgotten_as_its_loop_ends_leaves_nothing(workspace: Path) -> None:
    body = """
async def main():
    await start()
asyncio.run(main())
gc.collect()
print(num_children(), os.listdir(os.environ["TMPDIR"]))
"""
    done = run(script(workspace, FORGOTTEN + body))
    assert (done.stdout, done.returncode) == ("0 ['user']\n", 0)
    assert done.stderr.count("ResourceWarning: unclosed client") == done.stderr.count("Warning") == 1


def test_a_forgotten_client_is_quiet_unless_one_asks_for_warnings(workspace: Path) -> None:
    body = "async def main():\n    await start()\n    await wait_alone()\nasyncio.run(main())"
    assert_prints("alone\n", script(workspace, FORGOTTEN.replace("warnings.simplefilter", "#") + body))


def test_a_client_is_not_forgotten_while_somebody_reads_from_it(workspace: Path) -> None:
    body = """
async def ask():
    client = await start()
    return client.generate("x", max_tokens=300, ignore_eos=True)
async def main():
    generation = await ask()
    gc.collect()
    print(len([token async for token in generation]), num_children())
    del generation
    await wait_alone()
asyncio.run(main())
"""
    done = run(script(workspace, FORGOTTEN + body))
    assert (done.stdout, done.stderr.count("ResourceWarning: unclosed client")) == ("300 2\nalone\n", 1)


def test_a_client_whose_loop_is_closed_can_be_closed_from_another(workspace: Path) -> None:
    body = """
client = asyncio.run(start())
asyncio.run(client.close())
print(num_children(), client)
asyncio.run(client.close())
"""
    done = run(script(workspace, FORGOTTEN + body))
    assert done.stdout.startswith("0 <AsyncScaleClient")
    assert done.stdout.endswith("closed>\n")
    assert (done.stderr, done.returncode) == ("", 0)
