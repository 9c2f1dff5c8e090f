"""Attention of a step's tokens over the paged cache: planned once per step, run once per layer.

::

    attention = make_attention(cache, num_heads)
    plan = attention.plan(batch, window)
    attended = plan.attend(layer, queries)          # the new tokens' keys and values are in the cache
"""

from __future__ import annotations

import logging
from typing import Protocol

from torch import Tensor

from asyncscale.engine.batch import Batch
from asyncscale.kernels.attention import load_attention
from asyncscale.model.native_attention import NativeAttention
from asyncscale.model.torch_attention import TorchAttention
from asyncscale.model.torch_kv_cache import KVCache

_log = logging.getLogger(__name__)


class AttentionPlan(Protocol):
    """What every layer with the same window does in a step."""

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """queries: [tokens, num_heads, head_dim]. Returns the same shape and dtype; all between is float32."""


class Attention(Protocol):
    """A way to compute attention."""

    def plan(self, batch: Batch, window: int | None) -> AttentionPlan:
        """window: how many positions a token sees, its own included; None for all before it."""


def make_attention(cache: KVCache, num_heads: int) -> Attention:
    """The native kernel where there is one for the cache's device."""
    if cache.data.device.type != "cpu":
        return TorchAttention(cache)
    kernel = load_attention()
    if kernel is None:
        _log.warning(
            "asyncscale was installed without its native kernels (no C++ compiler?): "
            "attention is computed in torch, which is several times slower"
        )
        return TorchAttention(cache)
    return NativeAttention(kernel, cache, num_heads)
