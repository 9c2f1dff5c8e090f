"""The torch decoder with its experts dealt out to several engines, here threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from group_of_threads import GroupOfThreads, Member
from safetensors.torch import load_file, save_file

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError
from asyncscale.model import decoder
from asyncscale.model.expert_exchange import ExpertShare
from asyncscale.model.torch_weights import load_weights
from asyncscale.model.weights import weight_shapes
from asyncscale.tandem.core import CollectiveError

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "mlp_only_layers": [1]},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "eos_token_id": None},
}
NUM_TOKENS = 6
# Which engine has which prompts: one has none, or less to do than the others.
DEALS = {2: [[0, 1, 2, 3], []], 4: [[1], [0], [], [2, 3]]}


@pytest.fixture(autouse=True)
def torch_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "load_library", lambda: None)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, 300, length).tolist() for length in (1, 19, 40, 25)]


def start(
    num_engines: int, files: CheckpointFiles, make_runner: Callable[..., Any]
) -> tuple[GroupOfThreads, list[Any]]:
    """The runner of each member; they join when all have warmed up."""
    group = GroupOfThreads(num_engines)
    for member in group.members:
        member.joined = False
    runners = [make_runner(files, group=member) for member in group.members]
    assert [member.num_exchanges for member in group.members] == [0] * num_engines
    for member in group.members:
        member.joined = True
    return group, runners


@pytest.mark.parametrize("num_engines", DEALS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logprobs_are_those_of_an_engine_with_all_experts(
    family: str,
    num_engines: int,
    prompts: list[list[int]],
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
    make_runner: Callable[..., Any],
    drive: Any,
) -> None:
    files = save(make_model(family, **FAMILIES[family]))
    whole = drive(make_runner(files), len(prompts))
    expected = whole.generate(prompts, NUM_TOKENS, chunk=16, top=1)
    group, runners = start(num_engines, files, make_runner)

    def compute(member: Member) -> tuple[list[list[int]], list[Any]]:
        driver = drive(runners[member.engine_id], len(prompts))
        tokens = driver.generate([prompts[i] for i in DEALS[num_engines][member.engine_id]], NUM_TOKENS, 16, top=1)
        while member.num_exchanges < 100:  # more than any needs
            runners[member.engine_id].execute_dummy(lambda: None)
        return tokens, driver.logprobs

    for deal, (tokens, logprobs) in zip(DEALS[num_engines], group.run(compute), strict=True):
        assert tokens == [expected[i] for i in deal]
        for i, entries in zip(deal, logprobs, strict=True):
            np.testing.assert_allclose(entries, whole.logprobs[i], atol=1e-5)


@pytest.mark.parametrize("exchange", [0, 3, 5])
def test_a_step_whose_exchange_fails_can_be_made_again(
    exchange: int,
    prompts: list[list[int]],
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
    make_runner: Callable[..., Any],
    drive: Any,
) -> None:
    files = save(make_model("Olmoe", **FAMILIES["Olmoe"]))
    [expected] = drive(make_runner(files), 1).generate(prompts[2:3], 1)
    group, runners = start(2, files, make_runner)
    driver = drive(runners[0], 1)

    def step(member: Member) -> list[list[int]]:
        if member.engine_id == 0:
            return driver.generate(prompts[2:3], 1)
        runners[1].execute_dummy(lambda: None)
        return []

    def fail(number: int) -> None:
        if number == exchange:
            raise CollectiveError("as if another engine was gone")

    group.members[1].before_exchange = fail
    with pytest.raises(CollectiveError):
        group.run(step)
    assert group.run(step)[0] == [expected]


@pytest.mark.parametrize("original", [True, False], ids=["a tensor for each expert", "one tensor for all experts"])
def test_an_engine_loads_its_own_experts_and_all_that_is_not_an_expert(
    original: bool, make_model: Callable[..., Any], save: Callable[..., CheckpointFiles]
) -> None:
    files = save(make_model("Qwen3Moe", **FAMILIES["Qwen3Moe"]), save_original_format=original)
    config = ModelConfig.load(files)
    whole = load_weights(files, config, torch.float32).tensors
    fractions: list[float] = []
    share = ExpertShare.of(1, 3, 7)
    part = load_weights(files, config, torch.float32, None, fractions.append, share).tensors
    others = [f".experts.{i}." for i in range(7) if i not in share]
    assert part.keys() == {name for name in whole if not any(other in name for other in others)}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
    assert fractions[-1] == 1.0


def test_experts_elsewhere_are_checked_all_the_same(
    make_model: Callable[..., Any], save: Callable[..., CheckpointFiles]
) -> None:
    files = save(make_model("Olmoe", **FAMILIES["Olmoe"]))
    config = ModelConfig.load(files)
    path = Path(files.path) / "model.safetensors"
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    assert name in weight_shapes(config)
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path)
    with pytest.raises(ModelLoadError, match=r"experts\.7\.up_proj"):
        load_weights(files, config, torch.float32, share=ExpertShare.of(0, 2, 8))
