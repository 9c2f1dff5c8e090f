"""The decoder in torch, for GPUs and for installations without the native library.

It is the decoder-only transformer that Llama, Mistral, Qwen2 and Qwen3, and with experts Mixtral, Qwen3-MoE and OLMoE,
are cases of. Inference only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles, DType, EngineSpec
from asyncscale.memory import available_memory
from asyncscale.model.cache_size import num_cache_blocks
from asyncscale.model.decoder import Report, StepTokens, first_highest
from asyncscale.model.expert_exchange import ExpertExchange, RowGroup
from asyncscale.model.threads import num_threads
from asyncscale.model.torch_attention import TorchAttention, TorchPlan
from asyncscale.model.torch_devices import engine_device
from asyncscale.model.torch_experts import MLP, ExpertLayer, Experts, Router
from asyncscale.model.torch_kv_cache import KVCache, bytes_per_block
from asyncscale.model.torch_linear import Linear
from asyncscale.model.torch_weights import Weights, load_weights
from asyncscale.progress import Progress


class TorchDecoder:
    """A Decoder of decoder.py.

    The residual stream, norms, activation function and logits are float32 whatever the weights' dtype.
    """

    def __init__(
        self,
        spec: EngineSpec,
        files: CheckpointFiles,
        model: ModelConfig,
        max_model_len: int,
        report: Report,
        group: RowGroup | None = None,
    ) -> None:
        """group: the engines that the experts are dealt out to; each loads only its own. None: all are here."""
        self.num_threads = num_threads(spec)
        torch.set_num_threads(self.num_threads)
        self._device = engine_device(spec.engine_id)
        self._dtype = _dtype(spec.config.dtype, self._device)
        self.dtype = str(self._dtype).removeprefix("torch.")
        self._architecture = model
        self._exchange: ExpertExchange | None = None
        if group is not None and model.experts is not None:
            self._exchange = ExpertExchange(group, model.experts.num_experts)
        weights = self.load_weights(files, lambda fraction: report("weights", fraction))
        self.rope_factors = weights.rope_factors
        self.use_weights(weights)
        block_bytes = bytes_per_block(model, spec.config.block_size, self._dtype)
        self.num_blocks = num_cache_blocks(spec, max_model_len, block_bytes, _available_memory(self._device))
        self._cache = KVCache(model, self.num_blocks, spec.config.block_size, self._dtype, self._device)
        self._attention = TorchAttention(self._cache)
        self.token_cost = math.inf
        self._hidden = torch.empty(0)
        self.progress = Progress()

    def load_weights(self, files: CheckpointFiles, progress: Callable[[float], None]) -> Weights:
        """The weights of `files`, for `use_weights`. From any thread."""
        share = self._exchange.share if self._exchange is not None else None
        return load_weights(files, self._architecture, self._dtype, self._device, progress, share)

    def use_weights(self, weights: Weights) -> None:
        """Compute with these from now on. Takes them out of `weights`, so that none is held twice when layers store
        theirs in another layout."""
        tensors, model = weights.tensors, self._architecture
        self._eps = model.rms_norm_eps
        self._embedding = tensors.pop("model.embed_tokens.weight")
        self._layers = [_Layer(model, tensors, i, self._exchange) for i in range(model.num_layers)]
        self._norm = tensors.pop("model.norm.weight").float()
        self._head = Linear(tensors.pop("lm_head.weight"))
        self._windows = set(model.layer_windows)

    @torch.inference_mode()
    def forward(self, step: StepTokens) -> None:
        """Compute the hidden states of all tokens."""
        table = step.batch.table
        blocks = table.block_table[step.rows, step.positions // table.block_size]
        write_rows = self._cache.write_rows(self._indices(blocks), self._indices(step.positions % table.block_size))
        plans = {window: self._attention.plan(step.batch, window) for window in self._windows}
        cos, sin = (torch.from_numpy(part).to(self._device)[:, None] for part in (step.cos, step.sin))
        hidden = F.embedding(self._indices(step.token_ids), self._embedding).float()
        for index, layer in enumerate(self._layers):
            self._layer(layer, index, hidden, (cos, sin), write_rows, plans[layer.window])
        self._hidden = hidden

    def _layer(
        self,
        layer: _Layer,
        index: int,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        write_rows: Tensor,
        plan: TorchPlan,
    ) -> None:
        """Adds what the layer computes to `hidden`."""
        normed = self._rms_norm(hidden, layer.input_norm).to(self._dtype)
        queries, keys, values = layer.project(normed, *angles, self._eps)
        self._cache.write(index, write_rows, keys, values)
        self.progress.tick()
        attended = plan.attend(index, queries)
        self.progress.tick()
        hidden += layer.output(attended.flatten(1))
        normed = self._rms_norm(hidden, layer.post_attention_norm).to(self._dtype)
        hidden += layer.mlp(normed)
        self.progress.tick()

    @torch.inference_mode()
    def logits(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """float32[n, vocab_size] of tokens of the last step."""
        hidden = self._hidden[torch.from_numpy(indices).to(self._device)]
        logits: npt.NDArray[np.float32] = self._head(self._rms_norm(hidden, self._norm)).cpu().numpy()
        return logits

    def best(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The first highest logit's token of each, and that logit."""
        return first_highest(self.logits(indices))

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._eps)

    def _indices(self, array: npt.NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device)


class _Layer:
    """One layer's weights; projections that share their input are fused."""

    def __init__(
        self, config: ModelConfig, tensors: dict[str, Tensor], index: int, exchange: ExpertExchange | None
    ) -> None:
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

        def mlp(name: str) -> MLP:
            return MLP(linear(f"{name}.gate_proj", f"{name}.up_proj"), linear(f"{name}.down_proj"))

        self.mlp: MLP | ExpertLayer
        if (experts := config.experts_of(index)) is not None:
            router = Router(experts, tensors.pop(f"{prefix}mlp.gate.weight"))
            span = range(experts.num_experts) if exchange is None else exchange.share.experts
            mlps = [mlp(f"mlp.experts.{i}") for i in span]
            self.mlp = ExpertLayer(router, Experts(mlps, experts.num_experts, exchange))
        else:
            self.mlp = mlp("mlp")
        self._norms: tuple[Tensor, Tensor] | None = None
        if config.qk_norm:
            self._norms = (
                tensors.pop(f"{prefix}self_attn.q_norm.weight"),
                tensors.pop(f"{prefix}self_attn.k_norm.weight"),
            )
        self._limit = config.qkv_limit

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, each [tokens, heads, head_dim]; queries and keys are rotated."""
        heads = self._qkv(x).view(len(x), self._num_heads + 2 * self._num_kv_heads, self._head_dim)
        num_rotated = self._num_heads + self._num_kv_heads
        rotated, values = heads[:, :num_rotated], heads[:, num_rotated:]
        if self._norms is not None:
            parts = rotated[:, : self._num_heads], rotated[:, self._num_heads :]
            rotated = torch.cat([self._norm(part, norm, eps) for part, norm in zip(parts, self._norms, strict=True)], 1)
        if self._limit is not None:
            rotated, values = (part.clamp(-self._limit, self._limit) for part in (rotated, values))
        rotated = rotate(rotated, cos, sin)
        return rotated[:, : self._num_heads], rotated[:, self._num_heads :], values

    def _norm(self, heads: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Over as many neighbouring elements of a token as there are weights: a head, or all."""
        num_tokens, num_heads, head_dim = heads.shape
        parts = heads.reshape(num_tokens, num_heads * head_dim // len(weight), len(weight))
        return F.rms_norm(parts, weight.shape, weight, eps).view(heads.shape)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads: [tokens, num_heads, head_dim], of which element i is paired with i + head_dim / 2.

    cos, sin: float32[tokens, 1, head_dim / 2]. Computed in float32 and rounded once, to the heads' dtype.
    """
    first, second = heads.to(cos.dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(heads.dtype)


def _dtype(name: DType, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or _multiplies_bfloat16() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has dot products of bfloat16; others emulate them, slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _available_memory(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_memory()
