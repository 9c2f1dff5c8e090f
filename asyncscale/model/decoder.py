"""The decoder-only transformer that Llama, Mistral, Qwen2 and Qwen3 are cases of. Inference only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.model.attention import AttentionPlan
from asyncscale.model.kv_cache import KVCache
from asyncscale.model.linear import Linear
from asyncscale.model.rope import RotaryEmbedding, rotate
from asyncscale.model.torch_weights import Weights


class Decoder:
    """From tokens to hidden states, from hidden states to logits.

    ::

        decoder = Decoder(config, weights)                      # takes the tensors out of `weights`
        hidden = decoder.forward(token_ids, positions, lengths, plans, write_rows, cache)
        logits = decoder.logits(hidden[wanted])

    The residual stream, norms, activation function and logits are float32 whatever the weights' dtype.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        tensors = weights.tensors
        self._eps = config.rms_norm_eps
        self._embedding = tensors.pop("model.embed_tokens.weight")
        self.device = self._embedding.device
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, self.device, weights.rope_factors)
        self._layers = [_Layer(config, tensors, i) for i in range(config.num_layers)]
        self._norm = tensors.pop("model.norm.weight").float()
        self._head = Linear(tensors.pop("lm_head.weight"))

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        plans: dict[int | None, AttentionPlan],
        write_rows: Tensor,
        cache: KVCache,
        tick: Callable[[], None],
    ) -> Tensor:
        """Hidden states, float32[tokens, hidden_size], of all tokens of a step; their keys and values go to the cache.

        token_ids, positions, lengths: int64[tokens]; see RotaryEmbedding.cos_sin for lengths.
        plans: by sliding window. write_rows: of KVCache.write_rows. tick: is called several times in each layer.
        """
        dtype = self._embedding.dtype
        cos, sin = self.rotary.cos_sin(positions, lengths)
        hidden = F.embedding(token_ids, self._embedding).float()
        for index, layer in enumerate(self._layers):
            normed = self._rms_norm(hidden, layer.input_norm).to(dtype)
            queries, keys, values = layer.project(normed, cos, sin, self._eps)
            cache.write(index, write_rows, keys, values)
            tick()
            attended = plans[layer.window].attend(index, queries)
            tick()
            hidden += layer.output(attended.view(len(attended), -1))
            normed = self._rms_norm(hidden, layer.post_attention_norm).to(dtype)
            hidden += layer.mlp(normed)
            tick()
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """float32[n, vocab_size] of hidden states float32[n, hidden_size]."""
        return self._head(self._rms_norm(hidden, self._norm))

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._eps)


class _Layer:
    """One layer's weights; projections that share their input are fused."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor], index: int) -> None:
        prefix = f"model.layers.{index}."

        def linear(*names: str) -> Linear:
            weights = [tensors.pop(f"{prefix}{name}.weight") for name in names]
            biases = [tensors.pop(f"{prefix}{name}.bias", None) for name in names]
            bias = torch.cat([b for b in biases if b is not None]) if biases[0] is not None else None
            return Linear(torch.cat(weights) if len(weights) > 1 else weights[0], bias)

        self.window = config.layer_windows[index]
        self._num_heads, self._num_kv_heads, self._head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.input_norm = tensors.pop(f"{prefix}input_layernorm.weight").float()
        self.post_attention_norm = tensors.pop(f"{prefix}post_attention_layernorm.weight").float()
        self._qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.output = linear("self_attn.o_proj")
        self._gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self._down = linear("mlp.down_proj")
        self._qk_norm: Tensor | None = None
        if config.qk_norm:
            query_norm = tensors.pop(f"{prefix}self_attn.q_norm.weight").expand(config.num_heads, -1)
            key_norm = tensors.pop(f"{prefix}self_attn.k_norm.weight").expand(config.num_kv_heads, -1)
            self._qk_norm = torch.cat((query_norm, key_norm))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, each [tokens, heads, head_dim]; queries and keys are rotated."""
        heads = self._qkv(x).view(len(x), -1, self._head_dim)
        num_rotated = self._num_heads + self._num_kv_heads
        rotated = heads[:, :num_rotated]
        if self._qk_norm is not None:
            rotated = F.rms_norm(rotated, (self._head_dim,), None, eps) * self._qk_norm
        rotated = rotate(rotated, cos, sin)
        return rotated[:, : self._num_heads], rotated[:, self._num_heads :], heads[:, num_rotated:]

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, -1)
        return self._down((F.silu(gate.float()) * up).to(x.dtype))
