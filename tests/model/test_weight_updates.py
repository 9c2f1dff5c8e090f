"""A runner that is given other weights computes what one that was made with them computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import save_file

from asyncscale.config import CheckpointFiles, WeightUpdate
from asyncscale.errors import ModelLoadError
from asyncscale.model import decoder
from asyncscale.model.runner import ModelRunner

PROMPTS = [[5, 250, 17], list(range(40, 120))]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CASES: dict[str, tuple[bool, str, dict[str, Any], dict[str, Any]]] = {
    "native": (True, "Llama", {}, {}),
    "tied": (True, "Llama", {"tie_word_embeddings": True}, {}),
    "int8": (True, "Qwen3", {"head_dim": 32}, {"quantization": "int8"}),
    "experts": (True, "Mixtral", EXPERTS, {}),
    "torch": (False, "Llama", {}, {}),
    "torch-experts": (False, "Mixtral", EXPERTS, {}),
}


def updated(files: CheckpointFiles, path: Path, sha256: str = "1") -> CheckpointFiles:
    update = WeightUpdate(paths=(str(path),), sha256=sha256)
    return msgspec.structs.replace(files, updates=(*files.updates, update))


def save_tensors(model: Any, path: Path) -> Path:
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path)
    return path


def mapped_weights() -> set[str]:
    """Files of packed weights that this process has mapped."""
    with open("/proc/self/maps") as maps:
        return {line.split(maxsplit=5)[5].strip() for line in maps if ".weights" in line or ".building" in line}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any], dict[str, Any]]:
    is_native, architecture, model, config = CASES[request.param]
    if not is_native:
        monkeypatch.setattr(decoder, "load_library", lambda: None)
    return architecture, model, config


def test_tokens_after_the_change_are_those_of_the_new_weights(
    case: tuple[str, dict[str, Any], dict[str, Any]],
    tmp_path: Path,
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
    make_runner: Callable[..., ModelRunner],
    drive: Any,
) -> None:
    architecture, model, config = case
    new = make_model(architecture, seed=1, **model)
    new.save_pretrained(tmp_path / "new")  # as checkpoints name tensors, also where transformers holds them otherwise
    whole = CheckpointFiles(name="new", format="safetensors", path=str(tmp_path / "new"))
    files = save(make_model(architecture, **model))
    runner = make_runner(files, **config)
    before = drive(runner, max_num_seqs=4).generate(PROMPTS, 20)
    runner.use_weights(
        runner.load_weights(updated(files, tmp_path / "new" / "model.safetensors"), lambda fraction: None)
    )
    after = drive(runner, max_num_seqs=4).generate(PROMPTS, 20)
    assert before != after == drive(make_runner(whole, **config), max_num_seqs=4).generate(PROMPTS, 20)


def test_what_was_replaced_is_unmapped_and_files_of_updates_do_not_pile_up(
    tmp_path: Path,
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
    make_runner: Callable[..., ModelRunner],
    weight_cache_folder: Path,
) -> None:
    files = save(make_model("Llama"))
    runner = make_runner(files)
    [base] = weight_cache_folder.glob("*.weights")
    for version in range(3):
        path = save_tensors(make_model("Llama", seed=version), tmp_path / "update.safetensors")
        runner.use_weights(runner.load_weights(updated(files, path, str(version)), lambda fraction: None))
        assert len(mapped_weights()) == 1
    names = {name for name in os.listdir(weight_cache_folder) if name.endswith(".weights")}
    assert len(names) == 2
    assert base.name in names


def test_the_newest_of_several_updates_counts(
    tmp_path: Path,
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
    make_runner: Callable[..., ModelRunner],
    drive: Any,
) -> None:
    files = save(make_model("Llama"))
    paths = [save_tensors(make_model("Llama", seed=seed), tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    both = make_runner(updated(updated(files, paths[0], "1"), paths[1], "2"))
    newest = make_runner(updated(files, paths[1], "2"))
    assert drive(both, max_num_seqs=4).generate(PROMPTS, 9) == drive(newest, max_num_seqs=4).generate(PROMPTS, 9)


def test_weights_that_cannot_be_loaded_change_nothing(
    tmp_path: Path,
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
    make_runner: Callable[..., ModelRunner],
    drive: Any,
) -> None:
    files = save(make_model("Llama"))
    runner = make_runner(files, dtype="float16")
    before = drive(runner, max_num_seqs=4).generate(PROMPTS, 9)
    save_file({"model.layers.0.mlp.up_proj.weight": 1e6 + make_model("Llama").model.layers[0].mlp.up_proj.weight},
              tmp_path / "large.safetensors")  # fmt: skip
    with pytest.raises(ModelLoadError, match=r"model\.layers\.0\.mlp\.up_proj\.weight' cannot be float16"):
        runner.load_weights(updated(files, tmp_path / "large.safetensors"), lambda fraction: None)
    assert drive(runner, max_num_seqs=4).generate(PROMPTS, 9) == before
