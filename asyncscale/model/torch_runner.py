"""The runner that computes with torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles, DType, EngineConfig, EngineSpec
from asyncscale.engine.batch import Batch, SequenceTable, StepResult
from asyncscale.engine.request import Request
from asyncscale.errors import ModelLoadError
from asyncscale.messages import TokenLogprobs
from asyncscale.model.attention import make_attention
from asyncscale.model.decoder import Decoder
from asyncscale.model.kv_cache import KVCache, bytes_per_block
from asyncscale.model.logprobs import prompt_logprobs
from asyncscale.model.memory import available_memory
from asyncscale.model.sampler import Sampler
from asyncscale.model.torch_weights import load_weights
from asyncscale.params import Sampling

# Prompt positions whose logits are held at once: 25 MB for a vocabulary of 50,000.
_LOGITS_ROWS = 128


class TorchRunner:
    """A model from a checkpoint, its KV cache, and its sampler.

    ::

        runner = TorchRunner(spec, progress=lambda stage, fraction: ...)
        result = runner.execute(batch)

    supports_prefix_caching: whether keys and values depend on nothing but the tokens up to their own.
    Raises ModelLoadError where the checkpoint cannot be read or there is not enough memory.
    """

    def __init__(self, spec: EngineSpec, progress: Callable[[str, float], None] | None = None) -> None:
        if not isinstance(spec.model, CheckpointFiles):
            raise TypeError(f"TorchRunner computes checkpoints, not {type(spec.model).__name__}")
        report = progress or (lambda stage, fraction: None)
        config = spec.config
        torch.set_num_threads(config.threads_per_engine or _threads_per_engine(spec.num_engines))
        device = _device(spec.engine_id)
        dtype = _dtype(config.dtype, device)
        model = ModelConfig.load(spec.model)
        weights = load_weights(spec.model, model, dtype, device, lambda fraction: report("weights", fraction))
        self._decoder = Decoder(model, weights)
        self._windows = set(model.layer_windows)
        self.vocab_size = model.vocab_size
        self.max_model_len = _max_model_len(config, model)
        self.supports_prefix_caching = self.max_model_len <= _longest_shared_prefix(model)
        self.token_cost = math.inf
        self.dtype = str(dtype).removeprefix("torch.")
        self.num_blocks = _num_blocks(spec, model, self.max_model_len, dtype, device)
        self._cache = KVCache(model, self.num_blocks, config.block_size, dtype, device)
        self._attention = make_attention(self._cache, model.num_heads)
        self._sampler = Sampler(config.max_num_seqs, self.vocab_size)
        self._prompt_logprobs: dict[int, int] = {}
        self.tick: Callable[[], None] = lambda: None
        report("warm-up", 0.0)
        self._warm_up(config.block_size)
        report("warm-up", 1.0)

    def add(self, row: int, request: Request) -> None:
        """`request` occupies `row` from now on."""
        self._sampler.add(row, request)
        if request.sampling.prompt_logprobs is not None:
            self._prompt_logprobs[row] = request.sampling.prompt_logprobs

    def remove(self, row: int) -> None:
        """The request in `row` left."""
        self._sampler.remove(row)
        self._prompt_logprobs.pop(row, None)

    @torch.inference_mode()
    def execute(self, batch: Batch, meanwhile: Callable[[], None] = lambda: None) -> StepResult:
        """Compute the batch's tokens; sample where all of a sequence's tokens are computed then."""
        meanwhile()
        hidden = self._forward(batch)
        ends = np.cumsum(batch.num_new_tokens)
        computed = batch.table.num_computed_tokens[batch.rows] + batch.num_new_tokens
        complete = np.flatnonzero(computed == batch.table.num_tokens[batch.rows])
        of_prompts = {
            row: self._prompt_logprobs_of(batch, index, hidden[ends[index] - batch.num_new_tokens[index] : ends[index]])
            for index, row in enumerate(batch.rows.tolist() if self._prompt_logprobs else ())
            if row in self._prompt_logprobs
        }
        rows = batch.rows[complete]
        if not rows.size:
            return StepResult(rows, np.empty(0, np.int32), prompt_logprobs=of_prompts)
        logits = self._decoder.logits(hidden[self._tensor(ends[complete] - 1)])
        sampled = self._sampler.sample(logits, rows, batch.table)
        return StepResult(rows, sampled.token_ids, sampled.logprobs, of_prompts, sampled.errors)

    def _forward(self, batch: Batch) -> Tensor:
        """Hidden states of all new tokens, in the batch's order."""
        table, counts = batch.table, batch.num_new_tokens
        starts = table.num_computed_tokens[batch.rows]
        rows = np.repeat(batch.rows, counts)
        positions = np.arange(len(rows)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        blocks = table.block_table[rows, positions // table.block_size]
        plans = {window: self._attention.plan(batch, window) for window in self._windows}
        return self._decoder.forward(
            self._tensor(table.token_ids[rows, positions]),
            self._tensor(positions),
            self._tensor(np.maximum(table.num_prompt_tokens[rows], positions + 1)),
            plans,
            self._cache.write_rows(self._tensor(blocks), self._tensor(positions % table.block_size)),
            self._cache,
            self.tick,
        )

    def _prompt_logprobs_of(self, batch: Batch, index: int, hidden: Tensor) -> list[TokenLogprobs]:
        """Of the prompt tokens that the row's new tokens precede."""
        table, row = batch.table, int(batch.rows[index])
        first = int(table.num_computed_tokens[row]) + 1
        token_ids = table.token_ids[row, first : min(first + len(hidden), int(table.num_prompt_tokens[row]))]
        result: list[TokenLogprobs] = []
        for begin in range(0, len(token_ids), _LOGITS_ROWS):
            part = token_ids[begin : begin + _LOGITS_ROWS]
            logits = self._decoder.logits(hidden[begin : begin + len(part)])
            result += prompt_logprobs(logits, part, self._prompt_logprobs[row])
            self.tick()
        return result

    def _tensor(self, array: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._decoder.device)

    def _warm_up(self, block_size: int) -> None:
        """A chunk, then a decode, so that the first request does not wait for libraries to prepare their kernels."""
        length = min(block_size, self.max_model_len - 1)
        table = SequenceTable(1, length + 1, block_size)
        table.num_tokens[0] = table.num_prompt_tokens[0] = length
        row = np.zeros(1, np.int32)
        request = Request(b"", 0, np.zeros(length, np.int32), length, Sampling(max_tokens=1))
        self._sampler.add(0, request)
        for count in (length, 1):
            self.execute(Batch(table, row, np.array([count], np.int32)))
            table.num_computed_tokens[0] += count
            table.num_tokens[0] = length + 1
        self._sampler.remove(0)


def _threads_per_engine(num_engines: int) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(usable // num_engines, 1)


def _device(engine_id: int) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", engine_id % torch.cuda.device_count())
    return torch.device("cpu")


def _dtype(name: DType, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or _multiplies_bfloat16() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has dot products of bfloat16; others emulate them, slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    longest = model.max_model_len
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ModelLoadError(f"max_model_len is {config.max_model_len}, but the model's context is {longest} tokens")
    return config.max_model_len or longest


def _longest_shared_prefix(model: ModelConfig) -> float:
    """Up to which context equal prefixes have equal keys: dynamic RoPE turns keys by the prompt's length beyond it."""
    return model.rope.original_max_position_embeddings if model.rope.type == "dynamic" else math.inf


def _num_blocks(
    spec: EngineSpec, model: ModelConfig, max_model_len: int, dtype: torch.dtype, device: torch.device
) -> int:
    config = spec.config
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    room = config.kv_cache_memory_bytes
    if room is None:
        room = int(available_memory(device) * config.kv_cache_memory_fraction) // spec.num_engines
    block = bytes_per_block(model, config.block_size, dtype)
    if room < block:
        raise ModelLoadError(
            f"not enough memory for one KV block: {room:,} bytes are allowed for the KV cache of an engine, "
            f"a block of {config.block_size} tokens needs {block:,}"
        )
    usable = config.max_num_seqs * -(-max_model_len // config.block_size)
    return min(room // block, usable)
