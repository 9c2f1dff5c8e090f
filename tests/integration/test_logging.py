"""What engine processes log arrives in the handlers of their owner."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncscale import AsyncScaleClient, SimulatedModel

MODEL = SimulatedModel(base_ms=1, decode_us=1, prefill_us=0.1)


class Arrivals(logging.Handler):
    """Tells of each record when it comes: it is still on its way when a call has its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.any = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.any.set()


async def wait_records(caplog: pytest.LogCaptureFixture, wanted: set[str]) -> list[logging.LogRecord]:
    """The records with these messages, when all have come."""
    arrivals = Arrivals()
    logging.getLogger("asyncscale").addHandler(arrivals)
    try:
        async with asyncio.timeout(10):
            while not wanted <= set(caplog.messages):
                await arrivals.any.wait()
                arrivals.any.clear()
    finally:
        logging.getLogger("asyncscale").removeHandler(arrivals)
    return [record for record in caplog.records if record.getMessage() in wanted]


async def wait_state(client: AsyncScaleClient, state: str) -> None:
    """Return when all its engines are in this state."""
    async with asyncio.timeout(10):
        async for _ in client.watch_loads():
            if {engine.state for engine in client.health()} == {state}:
                return


async def test_records_of_engines_arrive_with_level_name_and_engine(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="asyncscale")
    before = time.time()
    async with AsyncScaleClient(MODEL, num_engines=2) as client:
        await client.collective_rpc("pause")
        records = await wait_records(caplog, {f"engine {i}: paused, with 0 requests" for i in range(2)})
        pids = [info["pid"] for info in await client.collective_rpc("process_info")]
    assert {(vars(record)["engine_id"], record.process) for record in records} == set(enumerate(pids))
    assert {(record.levelno, record.name) for record in records} == {(logging.INFO, "asyncscale.engine.core")}
    assert all(before <= record.created <= time.time() for record in records)
    assert {record.filename for record in records} == {"core.py"}


async def test_engines_follow_when_the_level_is_changed(caplog: pytest.LogCaptureFixture) -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, hang_timeout=0.5) as client:  # looked at every 50 ms
        await client.collective_rpc("pause")
        assert not any("paused" in message for message in caplog.messages)
        caplog.set_level(logging.INFO, logger="asyncscale")
        async with asyncio.timeout(10):
            while not any("resumed" in message for message in caplog.messages):
                await client.collective_rpc("resume")


async def test_what_an_engine_said_last_is_heard_before_its_death(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="asyncscale")
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        engine = client._engines.supervisor.engines[0]  # type: ignore[attr-defined]
        answer = client._dispatcher.call("pause", [])
        assert engine.lifeline.poll(10)  # without the loop, which learns of the record and of the death at once
        os.kill(engine.pid, signal.SIGKILL)
        assert multiprocessing.connection.wait([engine.process.sentinel], 10)
        client._engines.supervisor._on_exit(engine)  # type: ignore[attr-defined]
        await answer
        messages = caplog.messages
        assert messages.index("engine 0: paused, with 0 requests") < messages.index("engine 0 died (killed by SIGKILL)")


def test_an_owner_whose_loop_is_blocked_delays_no_engine(workspace: Path) -> None:
    # It logs more than the pipe to its owner holds; another client, on a loop of its own, sees it go on meanwhile.
    script = """
import asyncio, logging
from asyncscale import AsyncScaleClient, SimulatedModel
from asyncscale.background import BackgroundLoop

async def ask(client):
    return await client.generate("hello", max_tokens=3, ignore_eos=True)

async def main():
    logging.getLogger("asyncscale").setLevel(logging.INFO)
    background = BackgroundLoop()
    async with AsyncScaleClient(SimulatedModel(base_ms=0), num_engines=1) as owner:
        other = AsyncScaleClient.attach(owner.address)
        await asyncio.to_thread(background.run, other.start())
        calls = [owner._dispatcher.call("resume", []) for _ in range(3_000)]
        print(len(background.run(ask(other), timeout=30).token_ids))  # blocks the owner's loop
        await asyncio.gather(*calls)
        await asyncio.to_thread(background.run, other.close())
    background.close()

asyncio.run(main())
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=workspace, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == "3\n"
    # The engine may have more to say when its owner reads again: then it says as well what it could not.
    assert all("records were dropped while nobody read them" in line for line in result.stderr.splitlines())


def test_nothing_is_printed(workspace: Path) -> None:
    script = """
import asyncio
from asyncscale import AsyncScaleClient, SimulatedModel

async def main():
    async with AsyncScaleClient(SimulatedModel(), num_engines=2) as client:
        await client.collective_rpc("pause")
        await client.collective_rpc("resume")
        await client.generate("hello", max_tokens=3, ignore_eos=True)

asyncio.run(main())
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=workspace, capture_output=True, text=True, timeout=60, check=True
    )
    assert (result.stdout, result.stderr) == ("", "")


def test_what_programs_without_logging_see_of_a_death(workspace: Path) -> None:
    # Python itself prints warnings where nobody has configured logging: each of them once, and nothing below.
    script = """
import asyncio, os, signal
from asyncscale import AsyncScaleClient, SimulatedModel

async def main():
    async with AsyncScaleClient(SimulatedModel(), num_engines=1) as client:
        [info] = await client.collective_rpc("process_info")
        os.kill(info["pid"], signal.SIGKILL)
        await client.generate("hello", max_tokens=3, ignore_eos=True)
        while client.health()[0].state != "ready":
            await asyncio.sleep(0.01)

asyncio.run(main())
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=workspace, capture_output=True, text=True, timeout=60, check=True
    )
    died, ready = result.stderr.splitlines()
    assert died == "engine 0 died (killed by SIGKILL)"
    assert ready.startswith("engine 0 is ready again: process ")


async def test_a_crash_in_native_code_leaves_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        [info] = await client.collective_rpc("process_info")
        os.kill(info["pid"], signal.SIGSEGV)
        await wait_state(client, "restarting")
    assert "engine 0 died (killed by SIGSEGV)" in caplog.text
    assert "Fatal Python error: Segmentation fault" in caplog.text
    assert "in run_engine" in caplog.text
    assert {vars(record)["engine_id"] for record in caplog.records} == {0}


async def test_an_owner_that_closes_is_no_error_of_those_attached(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="asyncscale")
    owner = await AsyncScaleClient(MODEL, num_engines=2).start()
    async with AsyncScaleClient.attach(owner.address) as attached:
        await owner.close()
        await wait_state(attached, "dead")
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
    assert caplog.messages.count("all engines ended: its owner closed") == 1


async def test_an_owner_says_who_comes_and_goes_by_the_name_that_metrics_have(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="asyncscale")
    async with AsyncScaleClient(MODEL, num_engines=1) as owner:
        async with AsyncScaleClient.attach(owner.address) as attached:
            name = attached.metrics().client_id
        await wait_records(caplog, {f"client {name} is here: 1 are attached", f"client {name} is gone: 0 are attached"})
