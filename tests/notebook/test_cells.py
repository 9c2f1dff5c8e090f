"""A cell that makes a client, run again, in a real kernel."""

from __future__ import annotations

from jupyter_kernel import Kernel, wait_gone

MAKE = """
client = AsyncScaleClient(SimulatedModel(), num_engines=1)
await client.start()
client
"""


def test_a_cell_that_is_run_again_replaces_its_client_and_says_so(kernel: Kernel) -> None:
    first = kernel.run(MAKE, cell="a")
    assert first.stderr == ""
    engines = kernel.engines()
    assert len(engines) == 1
    second = kernel.run(MAKE.replace("num_engines=1", "num_engines=2"), cell="a")  # edited, and kept in Out[]
    assert "UserWarning: closed what this cell made" in second.stderr
    assert f"In [{first.number}]: <AsyncScaleClient" in second.stderr
    assert "client = AsyncScaleClient" in second.stderr  # the line that made it is shown
    wait_gone(engines)
    assert len(kernel.engines()) == 2
    answer = kernel.run("(await client.generate('x', max_tokens=3, ignore_eos=True)).finish_reason")
    assert answer.results[0]["text/plain"] == "'length'"
    assert "UserWarning" in kernel.run(MAKE, cell="a").stderr  # not only once
    assert len(kernel.engines()) == 1


def test_without_cell_ids_the_same_source_is_the_same_cell(kernel: Kernel) -> None:
    kernel.run("client = await AsyncScaleClient(SimulatedModel(), num_engines=1).start()")
    engines = kernel.engines()
    again = kernel.run("client = await AsyncScaleClient(SimulatedModel(), num_engines=1).start()")
    assert "UserWarning" in again.stderr
    wait_gone(engines)


def test_clients_of_other_cells_of_the_same_run_and_of_functions_stay(kernel: Kernel) -> None:
    kernel.run("def make(): return AsyncScaleClient(SimulatedModel(), num_engines=1)", cell="function")
    outcomes = [
        kernel.run("a = await make().start()", cell="a"),
        kernel.run("b, c = [await make().start() for _ in range(2)]", cell="b"),
        kernel.run("async with make() as d: pass", cell="d"),
        kernel.run("async with make() as d: pass", cell="d"),  # the first one is closed already
    ]
    assert [outcome.stderr for outcome in outcomes] == [""] * 4
    assert len(kernel.engines()) == 3
    again = kernel.run("b, c = [await make().start() for _ in range(2)]", cell="b")
    assert again.stderr.count("<AsyncScaleClient") == 2
    assert len(kernel.engines()) == 3
    assert kernel.run("print(a._life.state.value)").stdout == "running\n"


def test_a_client_that_another_cell_started_or_whose_cell_failed_is_replaced_too(kernel: Kernel) -> None:
    make = "client = AsyncScaleClient(SimulatedModel(), num_engines=1)"
    kernel.run(make, cell="make")
    kernel.run("await client.start()", cell="start")
    engines = kernel.engines()
    assert "UserWarning" in kernel.run(make, cell="make").stderr
    kernel.run("await client.start()", cell="start")
    wait_gone(engines)
    engines = kernel.engines()
    failed = kernel.run(f"{make}\nawait client.start()\n1 / 0", cell="make", ok=False)
    assert failed.error == "ZeroDivisionError"
    wait_gone(engines)
    engines = kernel.engines()
    assert "UserWarning" in kernel.run(f"{make}\nawait client.start()", cell="make").stderr
    wait_gone(engines)
    assert len(kernel.engines()) == 1


def test_wrong_arguments_replace_nothing(kernel: Kernel) -> None:
    kernel.run("client = await AsyncScaleClient(SimulatedModel(), num_engines=1).start()", cell="a")
    failed = kernel.run("client = await AsyncScaleClient(SimulatedModel(), num_engines=0).start()", cell="a", ok=False)
    assert failed.error == "ValueError"
    assert kernel.run("print(client._life.state.value)").stdout == "running\n"


def test_blocking_clients_are_replaced_too(kernel: Kernel) -> None:
    make = (
        "from asyncscale import blocking\nclient = blocking.AsyncScaleClient(SimulatedModel(), num_engines=1).start()"
    )
    kernel.run(make, cell="a")
    engines = kernel.engines()
    assert "UserWarning" in kernel.run(make, cell="a").stderr
    wait_gone(engines)
    assert len(kernel.engines()) == 1
    answer = kernel.run("len(client.generate('x', max_tokens=3, ignore_eos=True).result().token_ids)")
    assert answer.results[0]["text/plain"] == "3"
    kernel.run("client.close()")
