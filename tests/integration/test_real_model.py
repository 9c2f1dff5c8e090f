"""SmolLM2-135M-Instruct through whole engines, against transformers, which nobody here wrote.

Greedy decoding is checked by one transformers pass over prompt and answer: every token must be the argmax of what
comes before it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from asyncscale import AsyncScaleClient, Completion

if TYPE_CHECKING:
    from asyncscale.config import CheckpointFiles

pytestmark = pytest.mark.timeout(600)  # two implementations of a real model, on whatever this machine is

PROMPTS = [
    line.replace("\\n", "\n")
    for line in Path(__file__).with_name("prompts.txt").read_text(encoding="utf8").splitlines()
]
MAX_TOKENS = 64
LONG_TEXT = Path(asyncio.base_events.__file__).read_text(encoding="utf8")

# Greedy float32 logits of two correct implementations differ by rounding; a margin smaller than this decides nothing.
ROUNDING = 1e-4


class Oracle:
    """The model as transformers runs it, in float32 from the same GGUF file."""

    def __init__(self, files: CheckpointFiles) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        path = Path(files.path)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        ).eval()

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32[len(token_ids), vocabulary]."""
        with self._torch.inference_mode():
            logits: npt.NDArray[np.float32] = self._model(self._torch.tensor([list(token_ids)])).logits[0].numpy()
        return logits

    def check_greedy(self, completion: Completion) -> None:
        """Every generated token is the most likely one after those before it."""
        start = len(completion.prompt_token_ids)
        logits = self.logits(completion.prompt_token_ids + completion.token_ids)[start - 1 : -1]
        best = logits.max(axis=1)
        chosen = logits[np.arange(len(logits)), completion.token_ids]
        wrong = np.flatnonzero(chosen < best - ROUNDING)
        assert wrong.size == 0, f"{completion.text!r} leaves the greedy path at token {wrong[0]}"


@pytest.fixture(scope="module")
def oracle(smollm2_files: CheckpointFiles) -> Oracle:
    return Oracle(smollm2_files)


def generate(client: AsyncScaleClient, prompt: str, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": MAX_TOKENS, **options}
    if prompt.startswith("@chat "):
        return client.chat([{"role": "user", "content": prompt.removeprefix("@chat ")}], **options)
    return client.generate(prompt, **options)


@pytest.fixture
async def client() -> AsyncIterator[AsyncScaleClient]:
    # Chunks shorter than many prompts, blocks of another size than usual.
    async with AsyncScaleClient(
        num_engines=2, dtype="float32", max_num_seqs=8, max_num_batched_tokens=24, block_size=8
    ) as client:
        yield client


async def test_greedy_tokens_are_those_of_transformers_whatever_batch_engine_preemption_and_prefix_cache(
    client: AsyncScaleClient, oracle: Oracle
) -> None:
    assert len(PROMPTS) >= 32
    in_a_crowd = await asyncio.gather(*(generate(client, prompt) for prompt in PROMPTS))
    assert {completion.timing.engine for completion in in_a_crowd} == {0, 1}
    for completion in in_a_crowd:
        oracle.check_greedy(completion)
    expected = [completion.token_ids for completion in in_a_crowd]

    other_engine = await asyncio.gather(
        *(generate(client, p, engine=1 - c.timing.engine) for p, c in zip(PROMPTS, in_a_crowd, strict=True))
    )
    assert [completion.token_ids for completion in other_engine] == expected

    again = await asyncio.gather(
        *(generate(client, p, engine=c.timing.engine) for p, c in zip(PROMPTS, in_a_crowd, strict=True))
    )
    assert sum(completion.timing.num_cached_tokens > 0 for completion in again) >= 8
    assert [completion.token_ids for completion in again] == expected

    # A pool that two or three sequences fill: the others are preempted again and again.
    async with AsyncScaleClient(num_engines=1, dtype="float32", num_kv_blocks=16) as cramped:
        preempted = await asyncio.gather(*(generate(cramped, prompt) for prompt in PROMPTS[:12]))
        assert sum(completion.timing.num_preemptions for completion in preempted) > 0
        assert [completion.token_ids for completion in preempted] == expected[:12]


async def test_log_probabilities_are_those_of_transformers(client: AsyncScaleClient, oracle: Oracle) -> None:
    completion = await client.generate(LONG_TEXT[:1200], temperature=0, max_tokens=16, logprobs=3, prompt_logprobs=3)
    token_ids = completion.prompt_token_ids + completion.token_ids
    logits = oracle.logits(token_ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert completion.prompt_logprobs is not None
    assert completion.logprobs is not None
    tables = [*completion.prompt_logprobs[1:], *completion.logprobs]
    assert len(tables) == len(token_ids) - 1
    for position, table in enumerate(tables):
        assert table is not None
        assert token_ids[position + 1] in table
        for token_id, (logprob, rank) in table.items():
            assert logprob == pytest.approx(logprobs[position, token_id], abs=1e-3)
            assert abs(rank - 1 - (logprobs[position] > logprobs[position, token_id]).sum()) <= 1


async def test_bfloat16_agrees_on_the_most_likely_token_wherever_the_margin_is_clear(oracle: Oracle) -> None:
    async with AsyncScaleClient(num_engines=1, dtype="bfloat16") as client:
        completion = await client.generate(LONG_TEXT[:4000], max_tokens=1, prompt_logprobs=1)
    logits = oracle.logits(completion.prompt_token_ids)
    second, first = np.partition(logits, -2, axis=1)[:, -2:].T
    assert completion.prompt_logprobs is not None
    for position, table in enumerate(completion.prompt_logprobs[1:]):
        if first[position] - second[position] > 0.125:  # what bfloat16 tells apart where logits are 16 and more
            assert table is not None
            best = min(table, key=lambda token_id: table[token_id].rank)
            assert best == logits[position].argmax(), f"position {position}"


async def test_sampling_with_a_seed_gives_the_same_tokens_alone_in_a_crowd_preempted_and_on_another_engine(
    client: AsyncScaleClient,
) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_tokens": 32}
    alone = [await generate(client, prompt, engine=0, **options) for prompt in PROMPTS[:6]]
    expected = [completion.token_ids for completion in alone]
    crowd = await asyncio.gather(*(generate(client, prompt, engine=1, **options) for prompt in PROMPTS[:6]))
    assert [completion.token_ids for completion in crowd] == expected
    async with AsyncScaleClient(num_engines=1, dtype="float32", num_kv_blocks=8) as cramped:
        preempted = await asyncio.gather(*(generate(cramped, prompt, **options) for prompt in PROMPTS[:6]))
    assert sum(completion.timing.num_preemptions for completion in preempted) > 0
    assert [completion.token_ids for completion in preempted] == expected


async def test_requests_of_a_killed_engine_go_on_token_for_token(client: AsyncScaleClient) -> None:
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.3}, {"stop": ["."]}]

    def ask() -> list[Any]:
        return [generate(client, prompt, ignore_eos=True, **kinds[i % 4]) for i, prompt in enumerate(PROMPTS[:16])]

    undisturbed = await asyncio.gather(*ask())
    pids = [info["pid"] for info in await client.collective_rpc("process_info")]
    generations = ask()
    async for token in generations[0]:
        if token.index == 10:
            os.kill(pids[0], signal.SIGKILL)
    moved = await asyncio.gather(*generations)
    assert sum(completion.timing.num_moves for completion in moved) > 0
    assert [completion.choices for completion in moved] == [completion.choices for completion in undisturbed]
    async with asyncio.timeout(60):
        async for loads in client.watch_loads():
            if len(loads) == 2:
                break
    assert (await generate(client, PROMPTS[0], engine=0, ignore_eos=True)).choices == undisturbed[0].choices


async def test_streamed_text_is_the_tokenizers_decoding_of_all_tokens(client: AsyncScaleClient) -> None:
    codec = client._submission.codec
    for prompt in PROMPTS[20:28]:
        generation = generate(client, prompt, temperature=1.5, seed=1, ignore_eos=True)
        text = "".join([str(token) async for token in generation])
        assert text == codec.decode((await generation).token_ids)
