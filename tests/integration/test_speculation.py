"""Guessed tokens through real processes: who reads them sees no difference, whatever happens to the engine."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from asyncscale import AsyncScaleClient, Completion, Generation, SimulatedModel

MODEL = SimulatedModel(base_ms=1, decode_us=10, prefill_us=0.1, vocab_size=2000, output_period=9)
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "ignore_eos": False},
    {"seed": 3, "n": 3},
    {"seed": 4, "logprobs": 1},
    {"seed": 5, "stop": [" w1", " w7"], "ignore_eos": False},
    {"seed": 6, "stop": " w12", "min_tokens": 50},
    {"seed": 7, "presence_penalty": 0.5},
]


def ask(client: AsyncScaleClient) -> list[Generation]:
    options = [{"max_tokens": 300, "ignore_eos": True, **kind} for kind in KINDS]
    return [client.generate(f"prompt {i}", **option) for i, option in enumerate(options)]


async def accepted(client: AsyncScaleClient) -> int:
    return sum(stats["accepted_tokens"] for stats in await client.collective_rpc("speculation_stats"))


@pytest.fixture(scope="module")
def unguessed() -> list[Completion]:
    """What `ask` gives where nothing is guessed."""

    async def run() -> list[Completion]:
        async with AsyncScaleClient(MODEL, num_engines=1, speculation="off") as client:
            completions = list(await asyncio.gather(*ask(client)))
            assert await accepted(client) == 0
            return completions

    return asyncio.run(run())


async def test_completions_and_streams_are_what_they_are_without(unguessed: list[Completion]) -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        completions = await asyncio.gather(*ask(client))
        assert await accepted(client) > 100
        for completion, expected in zip(completions, unguessed, strict=True):
            assert completion.choices == expected.choices
        for generation, expected in zip(ask(client), unguessed, strict=True):
            tokens = [token async for token in generation]
            for choice in expected.choices:
                own = [token for token in tokens if token.choice == choice.index]
                assert [token.index for token in own] == list(range(len(choice.token_ids)))
                assert [token.token_id for token in own] == choice.token_ids
                assert "".join(token.text for token in own) == choice.text
                assert [token.finish_reason for token in own if token.finish_reason] == [choice.finish_reason]
        [stats] = await client.collective_rpc("kv_cache_stats")
        assert stats["free_blocks"] == stats["num_blocks"]


async def test_an_engine_that_dies_between_guesses_loses_nothing(unguessed: list[Completion]) -> None:
    async with AsyncScaleClient(MODEL, num_engines=2) as client:
        generations = ask(client)
        num_read = 0
        async for _ in generations[0]:
            num_read += 1
            if num_read == 100:
                [info, _] = await client.collective_rpc("process_info")
                os.kill(info["pid"], signal.SIGKILL)
        completions = await asyncio.gather(*generations)
        assert any(completion.timing.num_moves for completion in completions)
        for completion, expected in zip(completions, unguessed, strict=True):
            assert completion.choices == expected.choices


async def test_leaving_in_the_middle_of_guesses_frees_the_engine() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        for num_read in (1, 30, 31, 32, 33):
            async for token in client.generate("on and on", temperature=0, max_tokens=8000, ignore_eos=True):
                if token.index == num_read:
                    break
        async with asyncio.timeout(10):
            async for loads in client.watch_loads():
                if all(load.running == load.waiting == 0 for load in loads):
                    break
        [stats] = await client.collective_rpc("kv_cache_stats")
        assert stats["free_blocks"] == stats["num_blocks"]
        assert await accepted(client) > 0
