"""The chaos run itself: that it runs, and that it would tell."""

from __future__ import annotations

import asyncio

import pytest

from asyncscale import AsyncScaleClient, SimulatedModel
from asyncscale.bench.__main__ import main
from asyncscale.bench.chaos_requests import Catalogue, Load, Tally


def test_nothing_is_lost_in_seconds_of_chaos(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seconds", "6", "--num-clients", "1", "--num-in-flight", "12", "--interval", "0.4", "--seed", "5"]
    assert main(["chaos", *arguments]) == 0, capsys.readouterr().out
    figures = {
        what.strip(): int(count.replace(",", ""))
        for count, what in (line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
    }
    assert (figures["lost"], figures["tokens repeated"], figures["changed"]) == (0, 0, 0)
    assert figures["restarts"] > 0
    assert next(count for what, count in figures.items() if what.startswith("requests complete")) > 100


async def run(expected_from: Catalogue, catalogue: Catalogue, num_engines: int = 1) -> Tally:
    """A little load on engines that nobody disturbs, against what another catalogue expects."""
    async with AsyncScaleClient(SimulatedModel(base_ms=0.1), num_engines=num_engines) as client:
        expected = await expected_from.expect(client)
        load = Load(client, catalogue, expected, seed=1)
        running = asyncio.ensure_future(load.run(4))
        while load.tally.complete + load.tally.changed < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        load.stop()
        await running
    return load.tally


async def test_requests_as_expected_are_complete() -> None:
    tally = await run(Catalogue(seed=1), Catalogue(seed=1))
    assert (tally.changed, tally.repeated, tally.lost) == (0, 0, 0)


async def test_other_tokens_than_expected_are_found() -> None:
    tally = await run(Catalogue(seed=1), Catalogue(seed=2))
    assert tally.complete == 0
    assert tally.changed >= 20


async def test_requests_that_end_with_an_error_are_lost() -> None:
    async with AsyncScaleClient(SimulatedModel(base_ms=1, mean_output_tokens=64), num_engines=1) as client:
        catalogue = Catalogue(seed=1)
        load = Load(client, catalogue, await catalogue.expect(client), seed=1)
        running = asyncio.ensure_future(load.run(2))
        while client._dispatcher.num_live < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        load.stop()
        await client.close(drain=False)
        await running
    assert load.tally.lost == 2
    assert load.tally.errors[0].startswith("ClientClosedError")
