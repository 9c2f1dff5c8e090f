"""More load than there is room for: fair shares, limits, timeouts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncscale import AsyncScaleClient, SimulatedModel

MODEL = SimulatedModel(base_ms=0.5, decode_us=1, prefill_us=0.1)
SHORT: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
LONG: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True}


async def assert_idle(client: AsyncScaleClient) -> None:
    """Every engine's own counts, and this client's, are back at zero, and every KV block is free."""
    async with asyncio.timeout(20):
        async for loads in client.watch_loads():
            if not any(load.in_flight or load.running or load.waiting for load in loads):
                break
    for stats in await client.collective_rpc("kv_cache_stats"):
        assert stats["free_blocks"] == stats["num_blocks"]


# --- fair shares


@pytest.mark.parametrize("pinned", [False, True])
async def test_a_client_that_floods_does_not_starve_another(pinned: bool) -> None:
    """The flood is 2,000 requests deep; the modest client's, one after the other, each wait for one slot at most."""
    async with AsyncScaleClient(MODEL, num_engines=1, max_num_seqs=8) as flooder:
        flood = [flooder.generate("flood", engine=0 if pinned else None, **SHORT) for _ in range(2000)]
        async with AsyncScaleClient.attach(flooder.address) as modest:
            for _ in range(5):
                await modest.generate("hello", **SHORT)
            # Eight run at once, each for 20 steps: the flood goes through about five rounds of them meanwhile.
            assert sum(generation.done for generation in flood) < 500
            together = [modest.generate("hello", **SHORT) for _ in range(4)]
            await asyncio.gather(*together)
            assert sum(generation.done for generation in flood) < 1000
        for generation in flood:
            generation.abort()
        await assert_idle(flooder)


async def test_two_floods_share_the_slots() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2, max_num_seqs=8) as one:
        async with AsyncScaleClient.attach(one.address) as other:
            floods = [[client.generate("flood", **SHORT) for _ in range(600)] for client in (one, other)]
            await asyncio.gather(*floods[0][:300])
            done = [sum(generation.done for generation in flood) for flood in floods]
            assert min(done) > 0.5 * max(done), done
            for generation in [*floods[0], *floods[1]]:
                generation.abort()
        await assert_idle(one)
