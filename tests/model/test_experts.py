"""Mixture-of-experts checkpoints, as each maker writes them; and what the decoders make of their experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncscale.checkpoint.experts_config import ExpertsConfig
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError
from asyncscale.kernels.library import load_library
from asyncscale.model.torch_experts import Router
from asyncscale.model.torch_weights import load_weights
from asyncscale.model.weights import read_weights, weight_shapes

Edit = Callable[[dict[str, torch.Tensor]], object]

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [1]},
    "Olmoe": {"num_experts": 5, "num_experts_per_tok": 2, "eos_token_id": None},
}


def read(files: CheckpointFiles) -> dict[str, np.ndarray]:
    return dict(read_weights(files, ModelConfig.load(files)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("original", [True, False], ids=["a tensor for each expert", "one tensor for all experts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_experts_matrices_are_read_however_they_are_stored(
    family: str,
    original: bool,
    dtype: torch.dtype,
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
) -> None:
    model = make_model(family, **FAMILIES[family]).to(dtype)
    files = save(model, save_original_format=original)
    tensors = read(files)
    assert list(tensors) == list(weight_shapes(ModelConfig.load(files)))
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}.mlp"
        if not hasattr(layer.mlp, "experts"):
            assert np.array_equal(tensors[f"{name}.up_proj.weight"], layer.mlp.up_proj.weight.detach().float())
            continue
        assert np.array_equal(tensors[f"{name}.gate.weight"], layer.mlp.gate.weight.detach().float())
        for expert, (gate_up, down) in enumerate(
            zip(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, strict=True)
        ):
            gate, up = gate_up.chunk(2)
            for part, expected in (("gate", gate), ("up", up), ("down", down)):
                actual = tensors[f"{name}.experts.{expert}.{part}_proj.weight"]
                assert np.array_equal(actual, expected.detach().float())


@pytest.mark.parametrize(
    ("original", "name", "change", "message"),
    [
        (True, "experts.1.gate_proj.weight", None, r"1 tensors are missing, .*experts\.1\.gate_proj\.weight'"),
        (True, "experts.4.up_proj.weight", (40, 64), r"'.*experts\.4\.up_proj\.weight' is not part of a Qwen3Moe"),
        (
            True,
            "shared_expert.up_proj.weight",
            (40, 64),
            r"'.*shared_expert\.up_proj\.weight' is not part of a Qwen3Moe",
        ),
        (False, "experts.gate_up_proj", None, r"8 tensors are missing, .*experts\.0\.gate_proj\.weight'"),
        (False, "experts.gate_up_proj", (5, 80, 64), r"'.*mlp\.experts\.gate_up_proj' is not part of a Qwen3MoeFor"),
        (False, "experts.gate_up_proj", (4, 64, 80), r"'.*mlp\.experts\.gate_up_proj' has the shape \(32, 80\)"),
        (False, "experts.down_proj", (3, 64, 40), r"1 tensors are missing, .*experts\.3\.down_proj\.weight'"),
        (False, "gate.weight", (3, 64), r"'.*mlp\.gate\.weight' has the shape \(3, 64\), expected \(4, 64\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_where(
    original: bool,
    name: str,
    change: tuple[int, ...] | None,
    message: str,
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
) -> None:
    files = save(make_model("Qwen3Moe", **FAMILIES["Qwen3Moe"]), save_original_format=original)
    path = Path(files.path) / "model.safetensors"
    tensors = load_file(path)
    if change is None:
        del tensors[f"model.layers.0.mlp.{name}"]
    else:
        tensors[f"model.layers.0.mlp.{name}"] = torch.zeros(change)
    save_file(tensors, path)
    with pytest.raises(ModelLoadError, match=message):
        read(files)


def test_torch_has_routers_in_float32(make_model: Callable[..., Any], save: Callable[..., CheckpointFiles]) -> None:
    files = save(make_model("Mixtral", **FAMILIES["Mixtral"]))
    tensors = load_weights(files, ModelConfig.load(files), torch.bfloat16).tensors
    assert tensors["model.layers.2.mlp.gate.weight"].dtype == torch.float32
    assert tensors["model.layers.2.mlp.experts.2.up_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("normalizes", [False, True])
def test_torch_chooses_the_first_of_equally_probable_experts(normalizes: bool) -> None:
    weight = torch.zeros(64, 16)
    weight[40] = 1
    config = ExpertsConfig(
        num_experts=64, num_experts_per_token=4, intermediate_size=8, normalizes=normalizes, layers=(True,)
    )
    routing = Router(config, weight)(torch.tensor([[0.25] * 16, [0.0] * 16, [-0.25] * 16]))
    assert routing.expert_ids.tolist() == [[40, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    probabilities = torch.tensor([np.exp(4.0), 1, 1, 1]) / (63 + np.exp(4.0))
    expected = probabilities / probabilities.sum() if normalizes else probabilities
    torch.testing.assert_close(routing.weights[0], expected.float())


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_in_few_bits_are_close(
    family: str,
    weights: str,
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
    make_runner: Callable[..., Any],
    drive: Any,
) -> None:
    """All experts are chosen, as rounding may choose others; the checkpoint says so in its own words."""
    if load_library() is None:
        pytest.skip("the kernels were not built")
    num_experts = {
        name: value for name, value in FAMILIES[family].items() if name in ("num_experts", "num_local_experts")
    }
    model = make_model(family, **FAMILIES[family] | {"num_experts_per_tok": max(num_experts.values())})
    files = save(model)
    prompt = np.random.default_rng(0).integers(0, 300, 60).tolist()

    def logprobs(**config: str) -> np.ndarray:
        driver = drive(make_runner(files, **config), 1)
        driver.generate([prompt], 1, top=1)
        return np.array([entry[0] for entry in driver.prompt_logprobs[0]])

    exact = logprobs()
    rounded = logprobs(quantization="int8") if weights == "int8" else logprobs(dtype=weights)
    difference = np.abs(rounded - exact).mean()
    assert 0 < difference < {"bfloat16": 0.1, "float16": 0.01, "int8": 0.3}[weights]
