"""Which layers of a mixture-of-experts model have experts, and how a token's are chosen, as a checkpoint states it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from asyncscale.errors import ModelLoadError

EXPERT_ARCHITECTURES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM")

# What transformers takes where config.json does not mention it.
_NUM_EXPERTS = {"MixtralForCausalLM": 8, "Qwen3MoeForCausalLM": 128, "OlmoeForCausalLM": 64}
_NUM_EXPERTS_PER_TOKEN = {"MixtralForCausalLM": 2, "Qwen3MoeForCausalLM": 8, "OlmoeForCausalLM": 8}
_QWEN3_INTERMEDIATE_SIZE = 768

_SHARED_EXPERTS = ("num_shared_experts", "n_shared_experts", "shared_expert_intermediate_size")


class ExpertsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A layer with experts gives each token to the most probable ones, and adds up what they make of it, weighted.

    intermediate_size: of each expert. normalizes: whether the weights of a token's experts are divided by their sum;
    else they are the probabilities among all experts. layers: whether each layer has experts, or a plain MLP.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    normalizes: bool
    layers: tuple[bool, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any], architecture: str, source: str) -> ExpertsConfig | None:
        """From config.json; None where no layer has experts.

        Raises ModelLoadError that names `source` and what is not supported.
        """
        if architecture not in EXPERT_ARCHITECTURES:
            return None
        for name in _SHARED_EXPERTS:
            if config.get(name):
                raise ModelLoadError(
                    f"{source}: experts that all tokens share ({name} is {config[name]!r}) are not supported"
                )
        try:
            experts = msgspec.convert(_fields(config, architecture, source), cls)
        except msgspec.ValidationError as error:
            raise ModelLoadError(f"{source}: experts: {error}") from error
        if not any(experts.layers):
            return None
        _check(experts, source)
        return experts


def _fields(config: Mapping[str, Any], architecture: str, source: str) -> dict[str, Any]:
    is_qwen3 = architecture == "Qwen3MoeForCausalLM"
    num_experts = config.get("num_local_experts", config.get("num_experts", _NUM_EXPERTS[architecture]))
    inner = config.get("moe_intermediate_size", _QWEN3_INTERMEDIATE_SIZE) if is_qwen3 else config["intermediate_size"]
    layers = [num_experts != 0] * config["num_hidden_layers"]
    return {
        "num_experts": num_experts,
        "num_experts_per_token": config.get("num_experts_per_tok", _NUM_EXPERTS_PER_TOKEN[architecture]),
        "intermediate_size": inner,
        "normalizes": architecture == "MixtralForCausalLM" or config.get("norm_topk_prob", False),
        "layers": _without_plain_layers(layers, config, source) if is_qwen3 else layers,
    }


def _without_plain_layers(layers: list[bool], config: Mapping[str, Any], source: str) -> list[bool]:
    """Qwen3's: every decoder_sparse_step-th layer has experts, but for those of mlp_only_layers."""
    step, plain = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(step, int) or step < 1:
        raise ModelLoadError(f"{source}: decoder_sparse_step must be a positive integer, got {step!r}")
    if not isinstance(plain, list):
        raise ModelLoadError(f"{source}: mlp_only_layers must be a list of layers, got {plain!r}")
    return [has and (i + 1) % step == 0 and i not in plain for i, has in enumerate(layers)]


def _check(experts: ExpertsConfig, source: str) -> None:
    if experts.intermediate_size < 1:
        raise ModelLoadError(f"{source}: the size of experts must be positive, got {experts.intermediate_size}")
    if not 1 <= experts.num_experts_per_token <= experts.num_experts:
        raise ModelLoadError(
            f"{source}: num_experts_per_tok ({experts.num_experts_per_token}) must be between 1 and the number of "
            f"experts ({experts.num_experts})"
        )
