"""Kernels that are interrupted, restarted and killed: the next cell works, and no engine is left."""

from __future__ import annotations

import pytest
from jupyter_kernel import Kernel, wait_gone

START = "client = await AsyncScaleClient(SimulatedModel(), num_engines=2).start()"
LONG = "print('begun')\nawait client.generate('x', max_tokens=8000, ignore_eos=True)"


def test_an_interrupted_request_ends_and_the_client_goes_on(kernel: Kernel) -> None:
    kernel.run(START)
    for cell in (
        LONG,
        "print('begun')\n"
        "await asyncio.gather(*(client.generate('x', max_tokens=8000, ignore_eos=True) for _ in range(200)))",
        "print('begun')\nasync for token in client.generate('x', max_tokens=8000, ignore_eos=True): pass",
        "print('begun')\nimport time\ntime.sleep(60)",
    ):
        assert kernel.run(cell, interrupt_at="begun", ok=False).error in ("CancelledError", "KeyboardInterrupt")
        after = kernel.run("print((await client.generate('x', max_tokens=3, ignore_eos=True)).finish_reason)")
        assert (after.stdout, after.stderr) == ("length\n", "")
    kernel.run("async for loads in client.watch_loads():\n    if not any(load.in_flight for load in loads): break")


def test_an_interrupted_start_leaves_nothing_and_the_cell_can_be_run_again(kernel: Kernel) -> None:
    slow = "client = AsyncScaleClient(SimulatedModel(load_s=%s), num_engines=2)\nprint('begun')\nawait client.start()"
    assert kernel.run(slow % 60, cell="a", interrupt_at="begun", ok=False).error == "CancelledError"
    assert kernel.engines() == set()
    assert kernel.run("client").results[0]["text/plain"].endswith("closed>")
    again = kernel.run(slow % 0, cell="a")
    assert again.stderr == ""
    assert len(kernel.engines()) == 2


def test_an_interrupt_is_heard_while_nothing_happens(kernel: Kernel) -> None:
    kernel.run("AsyncScaleClient(SimulatedModel())")
    assert kernel.run("print('begun')\nawait asyncio.sleep(3600)", interrupt_at="begun", ok=False).error


def test_an_interrupted_async_with_closes_its_client(kernel: Kernel) -> None:
    cell = (
        "async with AsyncScaleClient(SimulatedModel(), num_engines=1):\n    print('begun')\n    await asyncio.sleep(60)"
    )
    assert kernel.run(cell, interrupt_at="begun", ok=False).error == "CancelledError"
    assert kernel.engines() == set()


def test_an_interrupted_close_goes_on(kernel: Kernel) -> None:
    kernel.run(f"{START}\nwork = client.generate('x', max_tokens=8000, ignore_eos=True)")
    engines = kernel.engines()
    kernel.run("print('begun')\nawait client.close()", interrupt_at="begun", ok=False)
    kernel.run("await client.close(drain=False)")
    wait_gone(engines)


@pytest.mark.parametrize("end", ["restart", "kill", "exit"])
def test_engines_end_with_the_kernel(fresh_kernel: Kernel, end: str) -> None:
    kernel = fresh_kernel
    kernel.run(f"{START}\nwork = client.generate('x', max_tokens=8000, ignore_eos=True)\nclient")
    engines = kernel.engines()
    assert len(engines) == 2
    match end:
        case "restart":
            kernel.restart()
            assert kernel.run(START).stderr == ""  # a new kernel knows nothing of the old one
        case "kill":
            kernel.process.kill()
        case "exit":
            kernel.client.shutdown()
    wait_gone(engines)
