"""A mixture-of-experts layer in torch: the router's choice, the experts' products, and the sum of their results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from asyncscale.checkpoint.experts_config import ExpertsConfig
from asyncscale.model.expert_exchange import ExpertExchange
from asyncscale.model.torch_linear import Linear


@dataclass(frozen=True, slots=True)
class MLP:
    """`mlp(x)`: down(silu(gate(x)) * up(x)), the activation in float32. x: [tokens, hidden_size].

    gate_up: gates, then as many ups.
    """

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down((F.silu(gate.float()) * up).to(x.dtype))


@dataclass(frozen=True, slots=True)
class Routing:
    """expert_ids: int64[tokens, num_experts_per_token], most probable first. weights: float32, of the same shape."""

    expert_ids: Tensor
    weights: Tensor


class Router:
    """`router(x)` is the Routing of x, [tokens, hidden_size]; in float32. The first of equal experts wins."""

    def __init__(self, config: ExpertsConfig, weight: Tensor) -> None:
        """weight: float32[num_experts, hidden_size]."""
        self._linear = Linear(weight)
        self._num_chosen = config.num_experts_per_token
        self._normalizes = config.normalizes

    def __call__(self, x: Tensor) -> Routing:
        probabilities = self._linear(x.float()).softmax(-1)
        weights, expert_ids = probabilities.sort(
            dim=-1, descending=True, stable=True
        )  # topk says nothing of equal ones
        weights, expert_ids = weights[:, : self._num_chosen], expert_ids[:, : self._num_chosen]
        if self._normalizes:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(expert_ids, weights)


class Experts:
    """`experts(x, routing)`: what each token's experts make of it, weighted and added up; float32[tokens, hidden_size].

    Rows are put in the order of experts, so that there is one product for each expert that has tokens. With an
    exchange, `experts` are the share of this engine, and each product is of the rows that all engines have for that
    expert; a call is then collective, and may be of no tokens.

    A token's results are added up where the token is, in the order of its routing: they depend on which engine computed
    them only as the last bits of a product may depend on how many rows are multiplied together.
    """

    def __init__(self, experts: list[MLP], num_experts: int, exchange: ExpertExchange | None = None) -> None:
        self._experts = experts
        self._num_experts = num_experts
        self._exchange = exchange

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        num_tokens, num_chosen = routing.expert_ids.shape
        experts_of_pairs, pairs = routing.expert_ids.flatten().sort(dim=0, stable=True)
        counts = torch.bincount(experts_of_pairs, minlength=self._num_experts)
        results = torch.empty((len(pairs), x.shape[1]), dtype=torch.float32, device=x.device)
        results[pairs] = self._compute(x[pairs // num_chosen], counts).float()
        return (results.view(num_tokens, num_chosen, x.shape[1]) * routing.weights[..., None]).sum(1)

    def _compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows: in the order of all experts. counts: int64[num_experts], how many of each."""
        if self._exchange is None:
            return self._multiply(rows, counts)
        return self._exchange.combine(self._multiply(*self._exchange.dispatch(rows, counts)))

    def _multiply(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows: in the order of the experts here, so many of each."""
        parts = zip(self._experts, torch.split(rows, counts.tolist()), strict=True)
        results = [expert(part) for expert, part in parts if len(part)]
        return torch.cat(results) if results else rows  # rows: none


class ExpertLayer:
    """`layer(x)`: a layer's experts in place of its MLP."""

    def __init__(self, router: Router, experts: Experts) -> None:
        self._router = router
        self._experts = experts

    def __call__(self, x: Tensor) -> Tensor:
        return self._experts(x, self._router(x))
