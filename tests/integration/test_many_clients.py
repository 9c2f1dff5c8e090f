"""Several clients on the same engines, in one process and in several."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from asyncscale import AsyncScaleClient, EngineDeadError, SimulatedModel

FAST = SimulatedModel(base_ms=0.2, decode_us=1, prefill_us=0.1)
LONG: dict[str, Any] = {"max_tokens": 5000, "ignore_eos": True}


async def reach(client: AsyncScaleClient, in_flight: int) -> None:
    """Wait until the client's table shows so many requests, of all clients together."""
    async with asyncio.timeout(10):
        async for loads in client.watch_loads():
            if sum(load.in_flight for load in loads) == in_flight:
                return


# --- leaving


async def test_an_owner_that_drains_lets_attached_clients_finish() -> None:
    owner = await AsyncScaleClient(FAST, num_engines=2).start()
    async with AsyncScaleClient.attach(owner.address) as other:
        generations = [other.generate(f"prompt {i}", max_tokens=500, ignore_eos=True) for i in range(6)]
        await reach(owner, 6)
        await owner.close(drain=True)
        assert [len((await generation).token_ids) for generation in generations] == [500] * 6
        with pytest.raises(EngineDeadError):
            other.generate("hello")


async def test_a_drain_does_not_wait_for_other_clients_for_ever() -> None:
    owner = await AsyncScaleClient(SimulatedModel(base_ms=50), num_engines=1).start()
    async with AsyncScaleClient.attach(owner.address) as other:
        generation = other.generate("hello", **LONG)
        await reach(owner, 1)
        await owner.close(drain=True, timeout=0.1)
        with pytest.raises(EngineDeadError):
            await generation


# --- start-up lines


async def test_start_up_lines_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="asyncscale")
    async with (
        AsyncScaleClient(FAST, num_engines=3) as owner,
        AsyncScaleClient.attach(owner.address),
        AsyncScaleClient.attach(owner.address),
    ):
        pass
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("3 engines ready in ")
