"""Conversations with a growing history on real engines: how much of it do they find in their prefix caches?"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from asyncscale import AsyncScaleClient, Completion, EngineLoad, RoutingRequest, SimulatedModel
from asyncscale.client.policies import Policy, least_loaded

_MODEL = SimulatedModel(base_ms=2, decode_us=20, prefill_us=10)
_BLOCK_SIZE = 16
_SYSTEM_TOKENS = 256
_MEAN_MESSAGE_TOKENS, _MEAN_ANSWER_TOKENS = 64, 32
# Who answers at once would find the engine just left to be the least loaded one, and stay without any affinity.
_MEAN_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Conversations:
    """All go on at once, each a turn at a time with pauses; a turn's prompt is all that was said before, and a new
    message.

    Each begins with one of the system prompts. The KV caches of all engines together hold every conversation once.
    """

    count: int = 24
    num_turns: int = 6
    num_system_prompts: int = 6
    num_engines: int = 4

    @property
    def num_kv_blocks(self) -> int:
        """Of each engine."""
        tokens = _SYSTEM_TOKENS + self.num_turns * (_MEAN_MESSAGE_TOKENS + _MEAN_ANSWER_TOKENS)
        return -(-self.count * tokens // (_BLOCK_SIZE * self.num_engines))


@dataclass(frozen=True, slots=True)
class AffinityFigures:
    """hit_rate: prompt tokens found in a prefix cache, over all. balance: requests of the engine that got most, over
    the mean of all engines. ttft_ms: mean."""

    name: str
    hit_rate: float
    balance: float
    ttft_ms: float


def ignore_affinity(loads: Sequence[EngineLoad], request: RoutingRequest) -> EngineLoad:
    """The engine with the least score, whatever is cached where."""
    return min(loads, key=lambda load: load.score)


async def measure_affinity(plan: Conversations, seed: int) -> list[AffinityFigures]:
    """The same conversations without affinity, with that of prompts, and with that of sessions, one after the other."""
    engines = AsyncScaleClient(
        _MODEL, num_engines=plan.num_engines, block_size=_BLOCK_SIZE, num_kv_blocks=plan.num_kv_blocks, progress=False
    )
    async with engines as owner:
        return [
            await _measure("no affinity", owner, plan, seed, ignore_affinity, has_sessions=False),
            await _measure("shared prompts", owner, plan, seed, least_loaded, has_sessions=False),
            await _measure("sessions", owner, plan, seed, least_loaded, has_sessions=True),
        ]


async def _measure(
    name: str, owner: AsyncScaleClient, plan: Conversations, seed: int, policy: Policy, *, has_sessions: bool
) -> AffinityFigures:
    await owner.collective_rpc("reset_prefix_cache")
    before = await _prefix_counts(owner)
    async with AsyncScaleClient.attach(owner.address, routing=policy) as client:
        talks = [_talk(client, plan, seed, index, has_sessions) for index in range(plan.count)]
        turns = [turn for turns in await asyncio.gather(*talks) for turn in turns]
    hits, queries = (now - then for now, then in zip(await _prefix_counts(owner), before, strict=True))
    engines = Counter(turn.timing.engine for turn in turns)
    return AffinityFigures(
        name=name,
        hit_rate=hits / queries,
        balance=max(engines.values()) * plan.num_engines / len(turns),
        ttft_ms=1000 * sum(turn.timing.ttft or 0.0 for turn in turns) / len(turns),
    )


async def _talk(
    client: AsyncScaleClient, plan: Conversations, seed: int, index: int, has_sessions: bool
) -> list[Completion]:
    rng = random.Random(f"conversation {seed} {index}")
    system = random.Random(f"system prompt {seed} {index % plan.num_system_prompts}")
    history = _tokens(system, _SYSTEM_TOKENS)
    turns = []
    for _ in range(plan.num_turns):
        await asyncio.sleep(rng.expovariate(1 / _MEAN_PAUSE_S))
        history += _tokens(rng, _around(rng, _MEAN_MESSAGE_TOKENS))
        turn = await client.generate(
            history,
            max_tokens=_around(rng, _MEAN_ANSWER_TOKENS),
            ignore_eos=True,
            temperature=0.0,
            session=f"conversation {index}" if has_sessions else None,
        )
        history += turn.token_ids
        turns.append(turn)
    return turns


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(_MODEL.vocab_size) for _ in range(count)]


def _around(rng: random.Random, mean: int) -> int:
    return rng.randint(mean // 2, mean + mean // 2)


async def _prefix_counts(client: AsyncScaleClient) -> tuple[int, int]:
    """Tokens found and looked up so far, by all engines."""
    stats = await client.collective_rpc("kv_cache_stats")
    return sum(each["prefix_hits"] for each in stats), sum(each["prefix_queries"] for each in stats)
