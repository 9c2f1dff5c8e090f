"""How many weights a model has, and how many of them a step reads."""

from __future__ import annotations

from dataclasses import dataclass

from asyncscale.checkpoint.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """Of all matrices; the rest is little.

    total: what is held in memory. every_step: what each step multiplies, whatever its tokens are. per_token: what one
    token's experts add to that; several tokens may share some.
    """

    total: int
    every_step: int
    per_token: int

    @classmethod
    def of(cls, model: ModelConfig) -> WeightCounts:
        """Of a model of this configuration."""
        hidden = model.hidden_size
        embedding = model.vocab_size * hidden
        every_step = embedding + 2 * model.num_layers * hidden * model.head_dim * (model.num_heads + model.num_kv_heads)
        all_experts = per_token = 0
        for layer in range(model.num_layers):
            experts = model.experts_of(layer)
            if experts is None:
                every_step += 3 * hidden * model.intermediate_size
                continue
            every_step += hidden * experts.num_experts  # the router
            expert = 3 * hidden * experts.intermediate_size
            all_experts += experts.num_experts * expert
            per_token += experts.num_experts_per_token * expert
        untied = 0 if model.tie_word_embeddings else embedding
        return cls(every_step + all_experts + untied, every_step, per_token)
