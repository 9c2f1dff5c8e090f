"""Requests whose results are known, sent without end; and what became of them."""

from __future__ import annotations

import asyncio
import random
from hashlib import blake2b
from typing import Any

import msgspec

from asyncscale import AsyncScaleClient, Completion, EngineDeadError, Generation

_KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 0.9, "n": 3},
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 0.9, "stop": " w1"},
    {"temperature": 0.9, "presence_penalty": 0.5, "repetition_penalty": 1.1, "min_tokens": 20},
)
_WORDS = ("river", "window", "seven", "because", "light", "after", "stone", "quiet", "before", "every")
_CANCELLED_PER_REQUEST = 0.1
# A request that has not ended after so long never will: everything that holds one up takes seconds.
_LOST_AFTER_S = 60.0


class Tally(msgspec.Struct):
    """What became of requests.

    complete: with the tokens of an undisturbed run. cancelled: on purpose. moved: of the complete ones, those that
    another engine finished. unlucky: aboard at two deaths, and failed for that, as promised. lost: ended with another
    error, or never. repeated: a token came twice or out of turn. changed: complete, with other tokens.
    pauses: the longest wait for a token of each one that moved, in seconds. errors: of those lost, some examples.
    """

    complete: int = 0
    cancelled: int = 0
    moved: int = 0
    unlucky: int = 0
    lost: int = 0
    repeated: int = 0
    changed: int = 0
    pauses: list[float] = []
    errors: list[str] = []

    def add(self, other: Tally) -> None:
        for name in ("complete", "cancelled", "moved", "unlucky", "lost", "repeated", "changed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.pauses = self.pauses + other.pauses
        self.errors = (self.errors + other.errors)[:10]


class Catalogue:
    """Requests of every kind, made from a seed: the same in every process."""

    def __init__(self, seed: int, size: int = 60, max_tokens: int = 150) -> None:
        draw = random.Random(seed)
        self._requests: list[tuple[str, dict[str, Any]]] = []
        for index in range(size):
            prompt = " ".join(draw.choices(_WORDS, k=draw.randint(3, 60)))
            options = dict(_KINDS[index % len(_KINDS)])
            options |= {"seed": draw.getrandbits(32), "max_tokens": draw.randint(10, max_tokens), "ignore_eos": True}
            options["min_tokens"] = min(options.get("min_tokens", 0), options["max_tokens"])
            self._requests.append((prompt, options))

    def __len__(self) -> int:
        return len(self._requests)

    def start(self, client: AsyncScaleClient, index: int) -> Generation:
        prompt, options = self._requests[index]
        return client.generate(prompt, **options)

    async def expect(self, client: AsyncScaleClient) -> list[bytes]:
        """The digest of each request's result, from engines that nobody disturbs."""
        return [digest(done) for done in await asyncio.gather(*(self.start(client, i) for i in range(len(self))))]


def digest(completion: Completion) -> bytes:
    """Of all that a caller sees of the result: tokens, text, endings, log-probabilities."""
    values = [
        (choice.token_ids, choice.text, choice.finish_reason, repr(choice.logprobs)) for choice in completion.choices
    ]
    return blake2b(repr((values, completion.prompt_logprobs)).encode(), digest_size=16).digest()


class Load:
    """Keeps so many requests in flight until told to stop, and checks each."""

    def __init__(self, client: AsyncScaleClient, catalogue: Catalogue, expected: list[bytes], seed: int) -> None:
        self.tally = Tally()
        self._client = client
        self._catalogue = catalogue
        self._expected = expected
        self._draw = random.Random(seed)
        self._stopping = False

    async def run(self, num_in_flight: int) -> None:
        """Return after `stop`, when the last request has ended."""
        await asyncio.gather(*(self._keep_asking() for _ in range(num_in_flight)))

    def stop(self) -> None:
        self._stopping = True

    async def _keep_asking(self) -> None:
        while not self._stopping:
            index = self._draw.randrange(len(self._catalogue))
            try:
                async with asyncio.timeout(_LOST_AFTER_S):
                    await self._ask(index)
            except EngineDeadError as error:
                if "aboard two engines" in str(error):
                    self.tally.unlucky += 1
                else:
                    self._lose(error)
            except Exception as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.tally.lost += 1
        self.tally.errors = [*self.tally.errors, f"{type(error).__name__}: {error}"[:500]][:10]

    async def _ask(self, index: int) -> None:
        generation = self._catalogue.start(self._client, index)
        leave_after = self._draw.randrange(50) if self._draw.random() < _CANCELLED_PER_REQUEST else None
        pause = await self._read(generation, leave_after)
        if pause is None:
            generation.abort()
            self.tally.cancelled += 1
            return
        completion = await generation
        if digest(completion) != self._expected[index]:
            self.tally.changed += 1
            return
        self.tally.complete += 1
        if completion.timing.num_moves:
            self.tally.moved += 1
            self.tally.pauses.append(pause)

    async def _read(self, generation: Generation, leave_after: int | None) -> float | None:
        """The longest wait for a token, in seconds; None when it was left before its end."""
        loop = asyncio.get_running_loop()
        next_index: dict[int, int] = {}
        longest, last, count = 0.0, loop.time(), 0
        async for token in generation:
            if token.index != next_index.get(token.choice, 0):
                self.tally.repeated += 1
            next_index[token.choice] = token.index + 1
            now = loop.time()
            longest, last, count = max(longest, now - last), now, count + 1
            if count == leave_after:
                return None
        return longest
