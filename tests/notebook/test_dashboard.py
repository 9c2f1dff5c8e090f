"""The dashboard's life, beside real engines, and in a real kernel."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
from jupyter_kernel import WIDGET, Kernel

from asyncscale import AsyncScaleClient, ClientStateError, SimulatedModel
from asyncscale.notebook.dashboard import Dashboard

MAKE = "client = await AsyncScaleClient(SimulatedModel(), num_engines=2).start()"


async def picture(dashboard: Dashboard, shows: Callable[[str], bool]) -> str:
    """The first picture, from now on, that shows something."""
    seen = asyncio.get_running_loop().create_future()

    def look(change: Any) -> None:
        if shows(change["new"]) and not seen.done():
            seen.set_result(change["new"])

    if shows(dashboard.widget.value):
        return str(dashboard.widget.value)
    dashboard.widget.observe(look, "value")
    try:
        return str(await seen)
    finally:
        dashboard.widget.unobserve(look, "value")


async def until_it_waits(client: AsyncScaleClient) -> None:
    """For a change of load, and until then for nothing."""
    while not client._dispatcher._load_waiters:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_it_follows_requests_and_deaths_and_ends_with_its_client() -> None:
    async with AsyncScaleClient(SimulatedModel(), num_engines=2, max_num_seqs=3) as client:
        dashboard = await client.dashboard()
        other = client.dashboard()  # works without await, too
        work = [client.generate("x", max_tokens=8000, ignore_eos=True) for _ in range(8)]
        await picture(dashboard, lambda html: html.count("3 of 3") == 2 and "2 requests of this client wait" in html)
        await picture(dashboard, lambda html: all(row.tokens_per_s > 0 for row in dashboard._rows))
        (info, _) = await client.collective_rpc("process_info")
        os.kill(info["pid"], signal.SIGKILL)
        await picture(dashboard, lambda html: "restarting" in html)
        await picture(dashboard, lambda html: "restarting" not in html)
        for generation in work:
            generation.abort()
        await picture(dashboard, lambda html: html.count("0 of 3") == 2)
        other.close()
        other.close()
        assert (dashboard.closed, other.closed) == (False, True)
    await picture(dashboard, lambda html: "the client is closed" in html)
    assert dashboard.closed
    assert "closed" in repr(dashboard)
    assert dashboard.widget.comm is None  # the frontend has let go of it


async def test_it_draws_nothing_while_nothing_changes_and_does_not_keep_its_client() -> None:
    client = await AsyncScaleClient(SimulatedModel(), num_engines=1).start()
    dashboard = await client.dashboard()
    await client.generate("x", max_tokens=500, ignore_eos=True)
    await picture(dashboard, lambda html: "0 of 64" in html)
    await until_it_waits(client)
    pictures: list[str] = []
    dashboard.widget.observe(lambda change: pictures.append(change["new"]), "value")
    client._dispatcher._notify_loads()  # a change that changes nothing
    await until_it_waits(client)
    assert pictures == []
    with pytest.warns(ResourceWarning, match="unclosed client"):
        del client
    await picture(dashboard, lambda html: "the client is closed" in html)


async def test_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    client = AsyncScaleClient(SimulatedModel(), num_engines=1)
    with pytest.raises(ClientStateError, match=r"await client.start\(\)"):
        client.dashboard()
    async with client:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
        with pytest.raises(ImportError, match=r"pip install 'asyncscale\[notebook\]'"):
            client.dashboard()


def test_in_a_notebook_it_is_shown_once_and_again_where_it_is_asked_for(kernel: Kernel) -> None:
    kernel.run(MAKE)
    first = kernel.run("dashboard = await client.dashboard()\ndashboard")
    assert first.results == []
    ((first_id, shown),) = first.displays.items()
    assert WIDGET in shown
    assert "0 of 64" in shown["text/html"]
    assert shown["text/plain"].startswith("<Dashboard, live>\nengine  state")
    again = kernel.run("dashboard")
    ((second_id, shown),) = again.displays.items()
    assert WIDGET in shown
    kernel.run("work = [client.generate('x', max_tokens=8000, ignore_eos=True) for _ in range(4)]")
    kernel.run("while '2 of 64' not in dashboard.widget.value: await asyncio.sleep(0.01)")
    closed = kernel.run("await client.close(drain=False)\nwhile not dashboard.closed: await asyncio.sleep(0.01)")
    for display_id in (first_id, second_id):  # a saved notebook shows this without a kernel
        assert WIDGET not in closed.displays[display_id]
        assert "the client is closed" in closed.displays[display_id]["text/html"]
    assert WIDGET not in next(iter(kernel.run("dashboard").displays.values()))


def test_a_cell_that_is_run_again_replaces_its_dashboard(kernel: Kernel) -> None:
    kernel.run(MAKE)
    kernel.run("mine = []")
    for _ in range(2):
        kernel.run("mine.append(await client.dashboard())", cell="a")
    kernel.run("mine.append(await client.dashboard())", cell="b")
    assert kernel.run("[dashboard.closed for dashboard in mine]").results[0]["text/plain"] == "[True, False, False]"
    kernel.run("for dashboard in mine: dashboard.close()")


def test_it_goes_on_after_an_interrupt(kernel: Kernel) -> None:
    kernel.run(MAKE)
    kernel.run("dashboard = await client.dashboard()")
    kernel.run(
        "print('begun')\nawait client.generate('x', max_tokens=8000, ignore_eos=True)", interrupt_at="begun", ok=False
    )
    kernel.run("while dashboard.widget.value.count('0 of 64') < 2: await asyncio.sleep(0.01)")
    kernel.run("work = client.generate('x', max_tokens=8000, ignore_eos=True)")
    kernel.run("while '1 of 64' not in dashboard.widget.value: await asyncio.sleep(0.01)")
    assert kernel.run("dashboard.closed").results[0]["text/plain"] == "False"
