"""Experts dealt out to engines, in real processes: the greedy tokens are those of transformers, however it goes."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from tokenizers import Tokenizer, models
from without_kernels import run_engine_without_kernels

from asyncscale import AsyncScaleClient, Completion, Generation, ModelLoadError, SimulatedModel
from asyncscale.client import supervisor

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "mlp_only_layers": [1]},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "eos_token_id": None},
}
LENGTHS = (1, 50, 70, 33, 90, 20)
NUM_TOKENS = 12


@dataclass(frozen=True)
class Checkpoint:
    """A random model in a folder, and what transformers makes of each prompt."""

    folder: str
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Of each family."""
    return {family: _make(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def _make(family: str, folder: Path) -> Checkpoint:
    model = random_model(family, **FAMILIES[family])
    _save(model, folder)
    generator = np.random.default_rng(2)
    shared = generator.integers(0, 300, 20).tolist()
    prompts = [(shared + generator.integers(0, 300, 90).tolist())[-length:] for length in LENGTHS]
    prompts += [shared + prompt for prompt in prompts[:3]]  # of these, the beginning may be in the cache
    return Checkpoint(str(folder), prompts, [_greedy(model, prompt) for prompt in prompts])


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0")).save(str(folder / "tokenizer.json"))


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    input_ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NUM_TOKENS}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    first, second = torch.cat(output.logits).topk(2).values.T
    assert (first - second).min() > 1e-4, "a near tie: the comparison of tokens would mean nothing"
    tokens: list[int] = output.sequences[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random checkpoints leave nothing in the user's own cache."""
    monkeypatch.setenv("ASYNCSCALE_CACHE", str(tmp_path / "cache"))


def open_client(checkpoint: Checkpoint, num_engines: int, *, spread: bool = True, **options: Any) -> AsyncScaleClient:
    options |= {"dtype": "float32", "block_size": 4, "num_kv_blocks": 512, "speculation": "ngram"}
    options |= {"max_num_seqs": 16, "max_num_batched_tokens": 32, "threads_per_engine": 1}
    return AsyncScaleClient(checkpoint.folder, num_engines=num_engines, enable_expert_parallel=spread, **options)


def ask(client: AsyncScaleClient, prompt: list[int], engine: int | None = None) -> Generation:
    return client.generate(prompt, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, engine=engine)


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


async def check_all(client: AsyncScaleClient, checkpoint: Checkpoint, engines: int | None = None) -> None:
    """All prompts at once. engines: so many of them get requests, the others none; None: as the client sends them."""
    generations = [
        ask(client, prompt, None if engines is None else i % engines) for i, prompt in enumerate(checkpoint.prompts)
    ]
    assert tokens_of(await asyncio.gather(*generations)) == checkpoint.expected


async def check_one_after_the_other(client: AsyncScaleClient, checkpoint: Checkpoint, num_engines: int) -> None:
    """Between two of them the engines pause."""
    for i, (prompt, expected) in enumerate(zip(checkpoint.prompts, checkpoint.expected, strict=True)):
        assert (await ask(client, prompt, i % num_engines)).token_ids == expected


@pytest.mark.parametrize(("num_engines", "spread"), [(2, True), (4, True), (4, False)])
@pytest.mark.parametrize("family", FAMILIES)
async def test_tokens_are_those_of_transformers_however_requests_are_dealt_out(
    family: str, num_engines: int, spread: bool, checkpoints: dict[str, Checkpoint]
) -> None:
    model = checkpoints[family]
    async with open_client(model, num_engines, spread=spread) as client:
        await check_all(client, model, engines=1)
        await check_all(client, model)
        await check_one_after_the_other(client, model, num_engines)


async def test_engines_without_native_kernels_exchange_rows_as_well(
    checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "run_engine", run_engine_without_kernels)
    model = checkpoints["Qwen3Moe"]
    async with open_client(model, 2) as client:
        await check_all(client, model, engines=1)
        await check_all(client, model)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_an_engine_is_lost_in_the_middle_and_no_request_is(
    number: signal.Signals, checkpoints: dict[str, Checkpoint]
) -> None:
    """One that is stopped is killed as one that hangs, as the others wait for it."""
    model = checkpoints["Olmoe"]
    async with open_client(model, 2, hang_timeout=5) as client:
        generations = [ask(client, prompt) for prompt in model.prompts * 3]
        tokens = aiter(generations[0])
        await anext(tokens)
        pid = client.health()[1].pid
        assert pid is not None
        os.kill(pid, number)
        completions = await asyncio.gather(*generations)
        assert tokens_of(completions) == model.expected * 3
        assert sum(completion.timing.num_moves for completion in completions) > 0
        assert [engine.restarts for engine in client.health()] == [0, 1]
        await check_all(client, model)


async def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    _save(random_model("Llama"), tmp_path)
    with pytest.raises(ModelLoadError, match="this LlamaForCausalLM has none: leave it off"):
        await AsyncScaleClient(str(tmp_path), enable_expert_parallel=True).start()
    with pytest.raises(ValueError, match=r"use SimulatedModel\(lockstep=True\)"):
        AsyncScaleClient(SimulatedModel(), enable_expert_parallel=True)
