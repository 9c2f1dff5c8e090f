"""The runner of checkpoints: from batches to their next tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles, EngineConfig, EngineSpec, ModelSource
from asyncscale.engine.batch import Batch, SequenceTable, StepResult
from asyncscale.engine.request import Request
from asyncscale.engine.verification import find_kept, sample_points
from asyncscale.errors import ModelLoadError
from asyncscale.messages import TokenLogprobs
from asyncscale.model.decoder import Report, StepTokens, make_decoder
from asyncscale.model.expert_exchange import RowGroup
from asyncscale.model.numpy_sampling import make_sampling_kernels
from asyncscale.model.rope import RotaryEmbedding
from asyncscale.model.sampler import Sampler
from asyncscale.params import Sampling
from asyncscale.progress import Progress

# Prompt positions whose logits are held at once: 25 MB for a vocabulary of 50,000.
_LOGITS_ROWS = 128


class ModelRunner:
    """A model from a checkpoint, its KV cache, and its sampler; imports no torch where the native library computes.

    ::

        runner = ModelRunner(spec, progress=lambda stage, fraction: ...)
        result = runner.execute(batch)

    group: the engines that the model's experts are dealt out to, where they are: `execute` and `execute_dummy` are then
    collective, once the group has joined, and may raise CollectiveError; such a step has made nothing, and may be made
    again. Until the group has joined, results mean nothing where experts are missing.
    decoder, sampler: what it is made of.
    supports_prefix_caching: whether keys and values depend on nothing but the tokens up to their own.
    Raises ModelLoadError where the checkpoint cannot be read or there is not enough memory.
    """

    def __init__(self, spec: EngineSpec, progress: Report | None = None, group: RowGroup | None = None) -> None:
        if not isinstance(spec.model, CheckpointFiles):
            raise TypeError(f"ModelRunner computes checkpoints, not {type(spec.model).__name__}")
        report = progress or (lambda stage, fraction: None)
        config = spec.config
        model = ModelConfig.load(spec.model)
        self.vocab_size = model.vocab_size
        self.max_model_len = _max_model_len(config, model)
        self.supports_prefix_caching = self.max_model_len <= _longest_shared_prefix(model)
        self.decoder = make_decoder(spec, spec.model, model, self.max_model_len, report, group)
        self.dtype = self.decoder.dtype
        self.num_blocks = self.decoder.num_blocks
        self.token_cost = self.decoder.token_cost
        self._rotary = RotaryEmbedding(model.rope, model.head_dim, self.decoder.rope_factors)
        self.sampler = Sampler(config.max_num_seqs, self.vocab_size, make_sampling_kernels(self.vocab_size))
        self._prompt_logprobs: dict[int, int] = {}
        self._no_tokens = Batch(SequenceTable(1, 1, config.block_size), np.empty(0, np.int32), np.empty(0, np.int32))
        report("warm-up", 0.0)
        self._warm_up(config)
        report("warm-up", 1.0)

    @property
    def progress(self) -> Progress:
        return self.decoder.progress

    @progress.setter
    def progress(self, progress: Progress) -> None:
        self.decoder.progress = progress

    def load_weights(self, model: ModelSource, progress: Callable[[float], None]) -> Any:
        """The weights of `model`, for `use_weights`. From any thread."""
        if not isinstance(model, CheckpointFiles):
            raise TypeError(f"ModelRunner computes checkpoints, not {type(model).__name__}")
        return self.decoder.load_weights(model, progress)

    def use_weights(self, weights: Any) -> None:
        """Compute with these from now on."""
        self.decoder.use_weights(weights)

    def add(self, row: int, request: Request) -> None:
        """`request` occupies `row` from now on."""
        self.sampler.add(row, request)
        if request.sampling.prompt_logprobs is not None:
            self._prompt_logprobs[row] = request.sampling.prompt_logprobs

    def remove(self, row: int) -> None:
        """The request in `row` left."""
        self.sampler.remove(row)
        self._prompt_logprobs.pop(row, None)

    def execute(self, batch: Batch, meanwhile: Callable[[], None] = lambda: None) -> StepResult:
        """Compute the batch's tokens; sample where all of a sequence's tokens are computed then."""
        meanwhile()
        # These two now, as the kernels fill the caches with weights.
        points = sample_points(batch)
        takes_best = self.sampler.takes_best(points.rows)
        self.forward(batch)
        of_prompts = self._all_prompt_logprobs(batch) if self._prompt_logprobs else {}
        if not points.rows.size:
            return StepResult(points.rows, np.empty(0, np.int32), prompt_logprobs=of_prompts)
        if takes_best:
            sampled = self.sampler.take_best(points.rows, *self.decoder.best(points.indices))
        else:
            logits = self.decoder.logits(points.indices)
            sampled = self.sampler.sample(logits, points.rows, batch.table, points.positions)
        kept = find_kept(batch, points, sampled.token_ids)
        return StepResult(points.rows[kept], sampled.token_ids[kept], sampled.logprobs, of_prompts, sampled.errors)

    def execute_dummy(self, meanwhile: Callable[[], None]) -> None:
        """Take part in a step of the group without a batch: compute what others send to the experts here."""
        meanwhile()
        self.forward(self._no_tokens)

    def forward(self, batch: Batch) -> None:
        """Compute the batch's tokens, for `decoder.logits` of any of them."""
        self.decoder.forward(self._step_tokens(batch))

    def _step_tokens(self, batch: Batch) -> StepTokens:
        table, counts = batch.table, batch.num_new_tokens
        starts = table.num_computed_tokens[batch.rows]
        if len(batch.rows) == batch.num_decodes and batch.num_drafts is None:
            rows, positions = batch.rows, starts
        else:
            rows = np.repeat(batch.rows, counts)
            first_tokens = np.cumsum(counts, dtype=np.int32) - counts
            positions = np.repeat(starts - first_tokens, counts) + np.arange(len(rows), dtype=np.int32)
        lengths = positions
        if self._rotary.depends_on_lengths:
            lengths = np.maximum(table.num_prompt_tokens[rows], positions + 1)
        cos, sin = self._rotary.cos_sin(positions, lengths)
        return StepTokens(batch, table.token_ids[rows, positions], positions, rows, cos, sin)

    def _all_prompt_logprobs(self, batch: Batch) -> dict[int, list[TokenLogprobs]]:
        """By row, of those that asked for it and compute in this batch."""
        firsts = np.cumsum(batch.num_new_tokens) - batch.num_new_tokens
        return {
            row: self._prompt_logprobs_of(batch, index, int(firsts[index]))
            for index, row in enumerate(batch.rows.tolist())
            if row in self._prompt_logprobs
        }

    def _prompt_logprobs_of(self, batch: Batch, index: int, first_token: int) -> list[TokenLogprobs]:
        """Of the prompt tokens that the row's new tokens, from `first_token` of the step on, precede."""
        table, row = batch.table, int(batch.rows[index])
        first = int(table.num_computed_tokens[row]) + 1
        last = min(first + int(batch.num_new_tokens[index]), int(table.num_prompt_tokens[row]))
        token_ids = table.token_ids[row, first:last]
        result: list[TokenLogprobs] = []
        for begin in range(0, len(token_ids), _LOGITS_ROWS):
            part = token_ids[begin : begin + _LOGITS_ROWS]
            logits = self.decoder.logits(first_token + begin + np.arange(len(part)))
            result += self.sampler.prompt_logprobs(logits, part, self._prompt_logprobs[row])
            self.progress.tick()
        return result

    def _warm_up(self, config: EngineConfig) -> None:
        """A chunk, then a decode, so that the first request does not wait for memory and libraries to be prepared."""
        length = min(config.block_size, config.max_num_batched_tokens, self.max_model_len - 1)
        table = SequenceTable(1, length + 1, config.block_size)
        table.num_tokens[0] = table.num_prompt_tokens[0] = length
        row = np.zeros(1, np.int32)
        request = Request(b"", 0, np.zeros(length, np.int32), length, Sampling(max_tokens=1))
        self.sampler.add(0, request)
        for count in (length, 1):
            self.execute(Batch(table, row, np.array([count], np.int32)))
            table.num_computed_tokens[0] += count
            table.num_tokens[0] = length + 1
        self.sampler.remove(0)


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    longest = model.max_model_len
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ModelLoadError(f"max_model_len is {config.max_model_len}, but the model's context is {longest} tokens")
    return config.max_model_len or longest


def _longest_shared_prefix(model: ModelConfig) -> float:
    """Up to which context equal prefixes have equal keys: dynamic RoPE turns keys by the prompt's length beyond it."""
    return model.rope.original_max_position_embeddings if model.rope.type == "dynamic" else math.inf
