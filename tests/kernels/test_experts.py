"""Which experts compute a token, and that no others do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tiny_models import ISAS, Array, Model, Reference, random_weights, tiny

MakeModel = Callable[..., Model]

NUM_EXPERTS = 20
CONFIG = tiny(
    architectures=["MixtralForCausalLM"], num_local_experts=NUM_EXPERTS, num_experts_per_tok=2, num_hidden_layers=1
)
TOKENS = np.random.default_rng(3).integers(0, 83, 300).tolist()  # more than are multiplied together
LAYER = "model.layers.0.mlp"


def spoilt_but_for(weights: dict[str, Array], *experts: int) -> dict[str, Array]:
    """The matrices of all other experts hold no numbers, which would spoil whatever they are multiplied by."""
    kept = tuple(f"{LAYER}.experts.{expert}." for expert in experts)
    return {
        name: np.full_like(values, np.nan) if ".experts." in name and not name.startswith(kept) else values
        for name, values in weights.items()
    }


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
def test_all_tokens_may_go_to_the_same_experts_and_the_others_compute_nothing(
    threads: int, isa: str, make_model: MakeModel
) -> None:
    weights = random_weights(CONFIG)
    weights["model.embed_tokens.weight"][:, 4] = 30  # what the router can tell by
    router = weights[f"{LAYER}.gate.weight"]
    router[:] = 0
    router[[17, 6], 4] = 1, 0.9
    model = make_model(isa, CONFIG, spoilt_but_for(weights, 17, 6), threads=threads)
    [logits] = model.run({0: TOKENS}, lambda row: len(TOKENS)).values()
    np.testing.assert_allclose(logits, Reference(CONFIG, weights, "float32").logits(TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_of_equally_probable_experts_the_first_are_chosen(isa: str, make_model: MakeModel) -> None:
    weights = random_weights(CONFIG)
    weights[f"{LAYER}.gate.weight"][:] = 0
    model = make_model(isa, CONFIG, spoilt_but_for(weights, 0, 1))
    [logits] = model.run({0: TOKENS}, lambda row: 7).values()
    np.testing.assert_allclose(logits, Reference(CONFIG, weights, "float32").logits(TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_a_router_that_is_no_number_spoils_tokens_and_nothing_else(isa: str, make_model: MakeModel) -> None:
    weights = random_weights(CONFIG)
    weights[f"{LAYER}.gate.weight"][3, 5] = np.nan
    model = make_model(isa, CONFIG, weights)
    [logits] = model.run({0: TOKENS}, lambda row: 40).values()
    assert not np.isfinite(logits).any()
