"""New weights in engines that run, against transformers with the same weights: tiny random models, real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_models import random_model

from asyncscale import AsyncScaleClient, ClientClosedError, Completion, EngineDeadError, ModelLoadError, SimulatedModel

torch = pytest.importorskip("torch")

PROMPT = list(range(20, 60))
LONG = 3000
ROUNDING = 1e-3  # a margin smaller than this decides nothing


def make_model(seed: int, architecture: str = "Llama", **config: Any) -> Any:
    return random_model(architecture, seed, max_position_embeddings=4096, **config)


def save_base(model: Any, folder: Path) -> str:
    from tokenizers import Tokenizer, models

    model.save_pretrained(folder)
    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return str(folder)


def save_tensors(model: Any, path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items() if wanted(name)}
    save_file(tensors, path)
    return path


def margins(model: Any, completion: Completion) -> Any:
    """bool[tokens]: whether each is the most likely one after all before it."""
    token_ids = completion.prompt_token_ids + completion.token_ids
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0, len(completion.prompt_token_ids) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    return (chosen >= logits.max(1).values - ROUNDING).tolist()


def is_greedy(model: Any, completion: Completion) -> bool:
    return all(margins(model, completion))


@pytest.fixture(autouse=True)
def weight_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASYNCSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # transformers' progress bars would leave a thread behind
    return tmp_path / "cache" / "weights"


def owner(model: str, num_engines: int = 2, **options: Any) -> AsyncScaleClient:
    return AsyncScaleClient(
        model, num_engines=num_engines, dtype="float32", num_kv_blocks=512, threads_per_engine=1, **options
    )


async def generate(client: AsyncScaleClient, max_tokens: int = 40, **options: Any) -> Completion:
    return await client.generate(PROMPT, max_tokens=max_tokens, temperature=0, ignore_eos=True, **options)


async def generate_everywhere(client: AsyncScaleClient) -> list[Completion]:
    return [await generate(client, engine=engine_id) for engine_id in range(2)]


async def wait_restart(client: AsyncScaleClient, engine_id: int) -> None:
    async with asyncio.timeout(30):
        while not (client.health()[engine_id].state == "ready" and client.health()[engine_id].restarts):
            await client._dispatcher.wait_load_change()


async def test_every_engine_computes_with_the_new_weights_and_says_so(tmp_path: Path, weight_cache: Path) -> None:
    models = [make_model(seed) for seed in range(3)]
    path = tmp_path / "update.safetensors"
    async with owner(save_base(models[0], tmp_path / "base")) as client:
        for version, model in enumerate(models):
            if version:
                # In place, as a training loop does.
                assert await client.update_weights(save_tensors(model, path)) == version
            for completion in await generate_everywhere(client):
                assert is_greedy(model, completion)
                assert completion.weight_versions == (version,)
        names = os.listdir(weight_cache)
        assert sum(name.endswith(".weights") for name in names) == 2  # of the base, and of what is in use
        path.unlink()
        os.kill(client.health()[1].pid or 0, signal.SIGKILL)
        await wait_restart(client, 1)
        assert is_greedy(models[2], await generate(client, engine=1))


async def test_requests_under_way_go_on_as_the_new_model_from_their_own_prefix(tmp_path: Path) -> None:
    old, new = make_model(0), make_model(1)
    path = save_tensors(new, tmp_path / "update.safetensors")
    async with (
        owner(save_base(old, tmp_path / "base")) as client,
        AsyncScaleClient.attach(client.address) as attached,
    ):
        running = [
            asyncio.ensure_future(generate(one, LONG, engine=i % 2))
            for i, one in enumerate([client, attached, attached])
        ]
        await asyncio.gather(*(generate(client, 1, engine=engine_id) for engine_id in range(2)))
        assert await attached.update_weights(path) == 1
        completions = await asyncio.gather(*running)
        short = await generate(attached)
    for completion in completions:
        assert completion.weight_versions == (0, 1)
        by_old, by_new = margins(old, completion), margins(new, completion)
        change = by_old.index(False)
        assert change > 1
        assert all(by_new[change:])
    assert is_greedy(new, short)


async def test_without_recomputing_requests_keep_their_keys_and_nobody_else_gets_them(tmp_path: Path) -> None:
    old, new = make_model(0), make_model(1)
    path = save_tensors(new, tmp_path / "update.safetensors")
    async with owner(save_base(old, tmp_path / "base"), num_engines=1) as client:
        running = asyncio.ensure_future(generate(client, LONG))
        await generate(client, 1)
        await client.update_weights(path, recompute=False)
        completion = await running
        assert completion.weight_versions == (0, 1)
        change = margins(old, completion).index(False)
        assert not all(margins(new, completion)[change:])
        assert completion.timing.num_preemptions == 0
        # Its answer is in no cache: a conversation that goes on with it is computed from the first token.
        more = await client.generate(
            completion.prompt_token_ids + completion.token_ids[:400], max_tokens=20, temperature=0, ignore_eos=True
        )
        assert more.timing.num_cached_tokens == 0
        assert is_greedy(new, more)


async def test_some_tensors_alone_and_updates_upon_another_and_a_folder(tmp_path: Path) -> None:
    base, other = make_model(0, tie_word_embeddings=True), make_model(1, tie_word_embeddings=True)
    path = tmp_path / "update.safetensors"
    expected = make_model(0, tie_word_embeddings=True)
    async with owner(save_base(base, tmp_path / "base")) as client:
        for part in ("layers.1.", "embed_tokens", "layers.0.self_attn."):
            names = {name for name in other.state_dict() if part in name}
            await client.update_weights(save_tensors(other, path, names.__contains__))
            expected.load_state_dict({name: other.state_dict()[name] for name in names}, strict=False)
            for completion in await generate_everywhere(client):
                assert is_greedy(expected, completion), part
        os.kill(client.health()[0].pid or 0, signal.SIGKILL)
        await wait_restart(client, 0)
        assert is_greedy(expected, await generate(client, engine=0))
        other.save_pretrained(tmp_path / "folder", max_shard_size="100KB")
        assert await client.update_weights(tmp_path / "folder") == 4
        assert is_greedy(other, await generate(client))


async def test_what_does_not_fit_is_an_error_that_says_why_and_changes_nothing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = make_model(0)
    norm = "model.norm.weight"
    wrong: dict[str, tuple[dict[str, Any] | bytes | None, str]] = {
        "missing": (None, r"missing\.safetensors do not exist"),
        "empty": (b"", r"empty\.safetensors is no safetensors file"),
        "text": (b"not weights at all", "is no safetensors file"),
        "nothing": ({}, "there is no weight of a LlamaForCausalLM"),
        "unknown": ({"model.nrom.weight": torch.ones(64)}, f"model.nrom.weight.*did you mean '{norm}'"),
        "shape": ({norm: torch.ones(63)}, f"{norm}' has the shape .63,., expected .64,."),
        "dtype": ({norm: torch.ones(64, dtype=torch.int64)}, f"{norm}' is I64"),
    }
    async with owner(save_base(base, tmp_path / "base")) as client:
        async with AsyncScaleClient.attach(client.address) as attached:
            for name, (content, reason) in wrong.items():
                path = tmp_path / f"{name}.safetensors"
                if isinstance(content, bytes):
                    path.write_bytes(content)
                elif content is not None:
                    save_file(content, path)
                for one in (client, attached):
                    with pytest.raises(ModelLoadError, match=reason):
                        await one.update_weights(path)
        for completion in await generate_everywhere(client):
            assert completion.weight_versions == (0,)
            assert is_greedy(base, completion)


async def test_an_engine_that_dies_meanwhile_comes_back_with_the_new_weights(tmp_path: Path) -> None:
    old, new = make_model(0), make_model(1)
    path = save_tensors(new, tmp_path / "update.safetensors")
    async with owner(save_base(old, tmp_path / "base")) as client:
        updating = asyncio.ensure_future(client.update_weights(path))
        os.kill(client.health()[1].pid or 0, signal.SIGKILL)
        assert await updating == 1
        await wait_restart(client, 1)
        for completion in await generate_everywhere(client):
            assert is_greedy(new, completion)
            assert completion.weight_versions == (1,)


async def test_an_engine_that_missed_the_change_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = make_model(1)
    path = save_tensors(new, tmp_path / "update.safetensors")
    async with owner(save_base(make_model(0), tmp_path / "base")) as client:
        connection = client._dispatcher._fleet[1]
        call = connection.call

        def refuse(method: str, args: Any) -> Any:
            return call("_drop_weights" if method == "_use_weights" else method, args)

        monkeypatch.setattr(connection, "call", refuse)
        assert await client.update_weights(path) == 1
        await wait_restart(client, 1)
        assert "weights of version 1" in (client.health()[1].last_error or "")
        for completion in await generate_everywhere(client):
            assert is_greedy(new, completion)


@pytest.mark.parametrize("moments", [1, 20, 100])
async def test_a_client_that_is_closed_meanwhile_ends_it(tmp_path: Path, moments: int) -> None:
    path = save_tensors(make_model(1), tmp_path / "update.safetensors")
    async with owner(save_base(make_model(0), tmp_path / "base")) as client:
        updating = asyncio.ensure_future(client.update_weights(path))
        for _ in range(moments):
            await asyncio.sleep(0)
    with pytest.raises(ClientClosedError):
        await updating


async def test_no_engine_is_left(tmp_path: Path) -> None:
    path = save_tensors(make_model(1), tmp_path / "update.safetensors")
    async with owner(save_base(make_model(0), tmp_path / "base"), num_engines=1, max_restarts=0) as client:
        os.kill(client.health()[0].pid or 0, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await client.update_weights(path)


async def test_engines_in_tandem_change_together(tmp_path: Path) -> None:
    experts = {"architecture": "Mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    old, new = make_model(0, **experts), make_model(1, **experts)
    base = save_base(old, tmp_path / "base")
    new.save_pretrained(tmp_path / "new")
    async with owner(base, enable_expert_parallel=True) as client:
        running = asyncio.ensure_future(generate(client, 500))
        assert (await generate(client, 1)).weight_versions == (0,)
        assert await client.update_weights(tmp_path / "new") == 1
        completion = await running
        assert completion.weight_versions == (0, 1)
        change = margins(old, completion).index(False)
        assert all(margins(new, completion)[change:])
        for completion in await generate_everywhere(client):
            assert is_greedy(new, completion)


@pytest.mark.parametrize("lockstep", [False, True])
async def test_a_simulated_model_counts_versions(tmp_path: Path, lockstep: bool) -> None:
    path = save_tensors(torch.nn.Linear(2, 2), tmp_path / "update.safetensors")
    async with AsyncScaleClient(SimulatedModel(base_ms=1, lockstep=lockstep), num_engines=2) as client:
        running = client.generate("Hello", max_tokens=700, ignore_eos=True)
        tokens = aiter(running)
        await anext(tokens)
        versions = await asyncio.gather(client.update_weights(path), client.update_weights(path))
        assert versions == [1, 2]
        assert (await client.generate("Hello", max_tokens=4)).weight_versions == (2,)
        assert (await running).weight_versions in {(0, 2), (0, 1, 2)}
        with pytest.raises(ModelLoadError):
            await client.update_weights(tmp_path / "none")
