"""Loading checkpoints: folders in one or several files, and what is said about broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError
from asyncscale.model.torch_weights import load_weights
from asyncscale.model.weights import read_weights, weight_shapes


@pytest.fixture
def files(make_model: Callable[..., Any], save: Callable[..., CheckpointFiles]) -> CheckpointFiles:
    return save(make_model("Llama"))


@pytest.fixture
def edit(files: CheckpointFiles) -> Callable[[Callable[[dict[str, torch.Tensor]], object]], None]:
    """Rewrites the folder's tensors with a function that changes the dict of them."""

    def apply(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        path = Path(files.path) / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def _load(files: CheckpointFiles) -> dict[str, np.ndarray]:
    return dict(read_weights(files, ModelConfig.load(files)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_all_tensors_are_read_exactly_whatever_they_are_stored_in(
    tied: bool, dtype: torch.dtype, make_model: Callable[..., Any], save: Callable[..., CheckpointFiles]
) -> None:
    model = make_model("Qwen2", tie_word_embeddings=tied).to(dtype)
    tensors = _load(save(model))
    expected = {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}
    expected["lm_head.weight"] = model.lm_head.weight.detach().float().numpy()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected[name])


def test_tensors_come_in_the_order_of_the_layers(files: CheckpointFiles) -> None:
    assert list(_load(files)) == list(weight_shapes(ModelConfig.load(files)))


def test_torch_has_them_in_the_dtype_that_is_asked_for_and_the_head_in_float32(
    make_model: Callable[..., Any], save: Callable[..., CheckpointFiles]
) -> None:
    model = make_model("Qwen2", tie_word_embeddings=True)
    files = save(model)
    tensors = load_weights(files, ModelConfig.load(files), torch.bfloat16).tensors
    expected = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}
    expected["lm_head.weight"] = model.lm_head.weight
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_several_files_with_an_index_hold_the_same_as_one(
    make_model: Callable[..., Any], tmp_path: Path, files: CheckpointFiles
) -> None:
    make_model("Llama").save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded = CheckpointFiles(name="s", format="safetensors", path=str(tmp_path / "sharded"))
    one, many = _load(files), _load(sharded)
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)


def test_progress_rises_to_one(files: CheckpointFiles) -> None:
    config = ModelConfig.load(files)
    fractions: list[float] = []
    for _ in read_weights(files, config, fractions.append):
        pass
    assert len(fractions) == len(weight_shapes(config))
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_a_missing_tensor_is_named(files: CheckpointFiles, edit: Callable[..., None]) -> None:
    edit(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelLoadError, match=r"1 tensors are missing, among them 'model\.layers\.1\.mlp\.up_proj"):
        _load(files)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(files: CheckpointFiles, edit: Callable[..., None]) -> None:
    edit(lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors.*'model\.norm\.weight'.*\(63,\), expected \(64,\)"):
        _load(files)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.3.input_layernorm.weight"])
def test_a_tensor_that_the_architecture_does_not_have_is_named(
    name: str, files: CheckpointFiles, edit: Callable[..., None]
) -> None:
    edit(lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(ModelLoadError, match=f"{name}' is not part of a LlamaForCausalLM"):
        _load(files)


def test_tensors_that_follow_from_the_configuration_are_ignored(
    files: CheckpointFiles, edit: Callable[..., None]
) -> None:
    edit(lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in _load(files)


def test_integer_weights_are_refused(files: CheckpointFiles, edit: Callable[..., None]) -> None:
    edit(lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(ModelLoadError, match=r"'model\.norm\.weight' is I8; supported are F32, F16, BF16"):
        _load(files)


@pytest.mark.parametrize("size", [0, 5, 1000, 50_000])
def test_a_truncated_file_is_named(size: int, files: CheckpointFiles) -> None:
    path = Path(files.path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelLoadError, match=r"cannot read .*model\.safetensors as a safetensors file"):
        _load(files)


def test_a_header_that_names_bytes_beyond_the_file_is_refused(files: CheckpointFiles) -> None:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}).encode()
    path = Path(files.path) / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(255))
    with pytest.raises(ModelLoadError, match=r"cannot read .*model\.safetensors as a safetensors file"):
        _load(files)


def test_tensors_that_are_not_aligned_in_their_file_are_in_memory(files: CheckpointFiles) -> None:
    path = Path(files.path) / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    before = {name: tensor.copy() for name, tensor in _load(files).items()}
    path.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    after = _load(files)
    assert all(tensor.flags.aligned and np.array_equal(tensor, before[name]) for name, tensor in after.items())


def test_a_missing_shard_is_named(make_model: Callable[..., Any], save: Callable[..., CheckpointFiles]) -> None:
    files = save(make_model("Llama"), max_shard_size="100KB")
    shard = min(Path(files.path).glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"{shard.name}, which .*index.json lists, is missing"):
        _load(files)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"weight_map": 3})])
def test_a_broken_index_is_named(content: str, files: CheckpointFiles) -> None:
    (Path(files.path) / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"cannot read .*index\.json as an index"):
        _load(files)


def test_a_folder_without_weights_is_named(files: CheckpointFiles) -> None:
    (Path(files.path) / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"folder holds no \*\.safetensors file"):
        _load(files)
