"""Tiny checkpoints of random weights, as transformers has them."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def random_model(architecture: str, seed: int = 0, **config: object) -> Any:
    """A transformers model, large enough that its greedy output varies; keywords go to its config."""
    sizes = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    config_class = getattr(transformers, f"{architecture}Config")
    model = getattr(transformers, f"{architecture}ForCausalLM")(config_class(**(sizes | config))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model
