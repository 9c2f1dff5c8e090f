"""Programs that fork while a client runs: the fork is no part of it, and the client does not notice."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from programs import assert_prints, processes_of, script

FORKED = """
import multiprocessing
async def main():
    async with AsyncScaleClient(FAST, num_engines=2) as client:
        generation = client.generate("x", max_tokens=300, ignore_eos=True)
        {fork}
        assert multiprocessing.active_children() == []
        print(len((await generation).token_ids), flush=True)
        print(len((await client.generate("x", max_tokens=3, ignore_eos=True)).token_ids), flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize(
    "fork",
    [
        "p = multiprocessing.get_context('fork').Process(target=int); p.start(); await asyncio.to_thread(p.join)",
        "import subprocess; subprocess.run([sys.executable, '-c', 'pass'], close_fds=False)",
        # As a child that leaves by the interpreter's own exit does, when what it ran was no asyncio.
        "import atexit\n        if os.fork() == 0:\n            atexit._run_exitfuncs(); os._exit(0)"
        "\n        await asyncio.to_thread(os.wait)",
        "with multiprocessing.get_context('fork').Pool(2) as pool: await asyncio.to_thread(pool.map, abs, range(9))",
    ],
    ids=["multiprocessing", "subprocess", "os.fork", "pool"],
)
def test_a_forked_child_that_exits_changes_nothing(workspace: Path, fork: str) -> None:
    assert_prints("300\n3\n", script(workspace, FORKED.format(fork=fork)))


def test_engines_end_with_a_killed_owner_though_a_forked_child_lives_on(workspace: Path, runtime_folders: Path) -> None:
    path = script(
        workspace,
        """
        async def main():
            async with AsyncScaleClient(FAST, num_engines=2) as client:
                pid = os.fork()
                if pid == 0:
                    time.sleep(60)
                    os._exit(0)
                print(pid, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
        """,
    )
    with subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        try:
            owner.wait(10)
            deadline = time.monotonic() + 5
            while (left := [p for p in processes_of(runtime_folders) if p != child]) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert left == []
        finally:
            child.kill()


USES_IT = """
import uvloop
def attach():
    async def ask():
        async with AsyncScaleClient.attach(client.address) as mine:
            return len((await mine.generate("y", max_tokens=4, ignore_eos=True)).token_ids)
    return asyncio.run(ask())
async def main():
    global client
    async with AsyncScaleClient(FAST, num_engines=2) as client:
        generation = client.generate("x", max_tokens=300, ignore_eos=True)
        await asyncio.sleep(0)
        if os.fork() == 0:
            try:
                {use}
            except ClientStateError as error:
                assert "fork" in str(error)
                os._exit(9)
            os._exit(8)
        _, status = await asyncio.to_thread(os.wait)
        print(os.waitstatus_to_exitcode(status), len((await generation).token_ids), flush=True)
        print(await client.generate("x", max_tokens=3, ignore_eos=True) is not None, flush=True)
{runner}.run(main())
"""


@pytest.mark.parametrize("runner", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("use", "code"),
    [
        ("client.generate('y')", 9),
        ("await client.collective_rpc('kv_cache_stats')", 9),
        ("await client.close(); await client.__aexit__(None, None, None)", 8),
        ("generation.abort(); del generation", 8),
        ("del client, generation; gc.collect()", 8),
    ],
    ids=["generate", "collective_rpc", "close", "abort", "forget"],
)
def test_a_fork_that_uses_the_client_is_told_so_and_changes_nothing(
    workspace: Path, use: str, code: int, runner: str
) -> None:
    assert_prints(f"{code} 300\nTrue\n", script(workspace, USES_IT.format(use=use, runner=runner)))


def test_a_fork_may_attach_to_the_engines_of_its_parent(workspace: Path) -> None:
    path = script(
        workspace, USES_IT.format(use="asyncio._set_running_loop(None); os._exit(attach())", runner="asyncio")
    )
    assert_prints("4 300\nTrue\n", path)
