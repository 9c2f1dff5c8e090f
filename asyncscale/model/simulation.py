"""A model that sleeps a modelled step time instead of computing; its tokens are a fixed function. Needs no torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from asyncscale.config import EngineConfig, Fault, ModelSource, SimulatedModel
from asyncscale.engine.batch import Batch, Int32, StepResult
from asyncscale.engine.request import Request
from asyncscale.engine.verification import find_kept, sample_points
from asyncscale.messages import TokenLogprobs
from asyncscale.progress import Progress

EOS_TOKEN_ID = 256  # below it, token ids are bytes of text
_TICK_S = 0.1
_UNLIKELY = -20.0  # log-probability of every token that was not chosen

UInt64 = npt.NDArray[np.uint64]


class SimulatedRunner:
    """A Runner whose tokens depend on prompt, seed (unless greedy) and absolute position, and on nothing else.

    About one token in `mean_output_tokens` is EOS_TOKEN_ID, which ends requests that have it among their
    stop_token_ids; all others are in [EOS_TOKEN_ID + 1, vocab_size). A stop token that comes before min_tokens is
    replaced by the next token id that is none. Penalties, biases, bad words and truncation are ignored.
    """

    def __init__(self, model: SimulatedModel, config: EngineConfig) -> None:
        if model.vocab_size <= EOS_TOKEN_ID + 1:
            raise ValueError(f"vocab_size must be greater than {EOS_TOKEN_ID + 1}, got {model.vocab_size}")
        if model.mean_output_tokens < 1:
            raise ValueError(f"mean_output_tokens must be at least 1, got {model.mean_output_tokens}")
        self.vocab_size = model.vocab_size
        self.max_model_len = config.max_model_len or model.max_model_len
        self.num_blocks = config.num_kv_blocks or model.num_kv_blocks
        self.dtype = "simulated"
        self.supports_prefix_caching = True
        self.token_cost = model.decode_us / max(1e3 * model.base_ms, 1e-6)
        self._model = model
        self._requests: dict[int, Request] = {}
        self._keys: UInt64 = np.zeros(config.max_num_seqs, np.uint64)
        self._min_num_tokens: npt.NDArray[np.int64] = np.zeros(config.max_num_seqs, np.int64)
        self._min_token_rows: set[int] = set()
        self._logprob_rows: set[int] = set()
        self._prompt_logprob_rows: set[int] = set()
        self._replies = {key.encode(): text.encode() for key, text in model.replies.items()}
        self._reply_rows: dict[int, bytes] = {}
        self._fault_rows: dict[int, Fault] = {}
        self.progress = Progress()
        time.sleep(model.load_s)

    def load_weights(self, model: ModelSource, progress: Callable[[float], None]) -> None:
        """There are none: only their versions are counted."""

    def use_weights(self, weights: None) -> None:
        pass

    def add(self, row: int, request: Request) -> None:
        sampling = request.sampling
        self._requests[row] = request
        self._keys[row] = _key(request)
        self._min_num_tokens[row] = min(request.num_prompt_tokens + sampling.min_tokens, 2**62)
        if sampling.min_tokens:
            self._min_token_rows.add(row)
        if sampling.logprobs is not None:
            self._logprob_rows.add(row)
        if sampling.prompt_logprobs is not None:
            self._prompt_logprob_rows.add(row)
        if self._replies:
            token_ids = request.token_ids[: request.num_prompt_tokens]
            prompt = token_ids[token_ids < EOS_TOKEN_ID].astype(np.uint8).tobytes()
            reply = next((text for key, text in self._replies.items() if key in prompt), None)
            if reply is not None:
                self._reply_rows[row] = reply
        if self._model.faults:
            prompt_ids = request.token_ids[: request.num_prompt_tokens].tolist()
            fault = next((self._model.faults[token] for token in prompt_ids if token in self._model.faults), None)
            if fault is not None:
                self._fault_rows[row] = fault

    def remove(self, row: int) -> None:
        del self._requests[row]
        self._min_token_rows.discard(row)
        self._logprob_rows.discard(row)
        self._prompt_logprob_rows.discard(row)
        self._reply_rows.pop(row, None)
        self._fault_rows.pop(row, None)

    def execute(self, batch: Batch, meanwhile: Callable[[], None] = lambda: None) -> StepResult:
        start = time.monotonic()
        meanwhile()
        points = sample_points(batch)
        token_ids = self._tokens(self._keys[points.rows], points.positions)
        if self._reply_rows:
            self._recite(points.rows, points.positions, token_ids)
        errors = {}
        if self._min_token_rows:
            errors = self._replace_early_stops(points.rows, points.positions, token_ids)
        kept = find_kept(batch, points, token_ids)
        rows, token_ids = points.rows[kept], token_ids[kept]
        logprobs = {}
        if self._logprob_rows:
            for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
                if row in self._logprob_rows:
                    logprobs[row] = self._logprobs(token_id, self._requests[row].sampling.logprobs or 0)
        prompt_logprobs = self._prompt_logprobs(batch) if self._prompt_logprob_rows else {}
        if self._fault_rows:
            errors |= self._fail(batch)
        self._sleep_until(start + self._step_seconds(batch))
        return StepResult(rows, token_ids, logprobs, prompt_logprobs, errors)

    def execute_dummy(self, meanwhile: Callable[[], None]) -> None:
        """A step without a batch takes no time."""
        meanwhile()

    def _fail(self, batch: Batch) -> dict[int, str]:
        """What the faults in the batch ask for. Returns the rows that fail alone."""
        errors = {}
        for row in batch.rows.tolist():
            match self._fault_rows.get(row):
                case "error":
                    errors[row] = "the prompt asked the simulated model for an error"
                case "raise":
                    raise RuntimeError("a prompt asked the simulated model for an exception")
                case "exit":
                    os._exit(3)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "segfault":
                    os.kill(os.getpid(), signal.SIGSEGV)
                case "hang":
                    threading.Event().wait()
        return errors

    def _tokens(self, keys: UInt64, positions: Int32) -> Int32:
        bits = _mix(keys + positions.astype(np.uint64) * _GOLDEN)
        is_end = bits % np.uint64(self._model.mean_output_tokens) == 0
        if self._model.output_period:
            bits = _mix(keys + (positions % self._model.output_period).astype(np.uint64) * _GOLDEN)
        first = EOS_TOKEN_ID + 1
        token_ids: Int32 = ((bits >> np.uint64(20)) % np.uint64(self.vocab_size - first)).astype(np.int32)
        token_ids += first
        token_ids[is_end] = EOS_TOKEN_ID
        return token_ids

    def _recite(self, rows: Int32, positions: Int32, token_ids: Int32) -> None:
        """Change the tokens of requests that have a scripted reply, in place."""
        for index, row in enumerate(rows.tolist()):
            reply = self._reply_rows.get(row)
            if reply is not None:
                nth = int(positions[index]) - self._requests[row].num_prompt_tokens
                token_ids[index] = reply[nth] if nth < len(reply) else EOS_TOKEN_ID

    def _replace_early_stops(self, rows: Int32, positions: Int32, token_ids: Int32) -> dict[int, str]:
        """Change stop tokens that come before min_tokens, in place. Returns the rows that have no other token."""
        errors = {}
        for index in np.flatnonzero(positions < self._min_num_tokens[rows]).tolist():
            row, token_id = int(rows[index]), int(token_ids[index])
            stops = self._requests[row].sampling.stop_token_ids
            if token_id in stops:
                allowed = self._next_allowed(token_id, frozenset(stops))
                if allowed is None:
                    errors[row] = (
                        "min_tokens is not reached, and stop_token_ids hold every token of the simulated model"
                    )
                else:
                    token_ids[index] = allowed
        return errors

    def _next_allowed(self, token_id: int, stops: frozenset[int]) -> int | None:
        first = EOS_TOKEN_ID + 1
        num_tokens = self.vocab_size - first
        candidates = (first + (token_id + offset) % num_tokens for offset in range(num_tokens))
        return next((candidate for candidate in candidates if candidate not in stops), None)

    def _logprobs(self, token_id: int, num_top: int) -> TokenLogprobs:
        """The chosen token has all the probability there is; the ids after it follow."""
        top = [(token_id + offset) % self.vocab_size for offset in range(num_top)]
        return TokenLogprobs([token_id, *top], [0.0, *([0.0] + [_UNLIKELY] * num_top)[:num_top]], 1)

    def _prompt_logprobs(self, batch: Batch) -> dict[int, list[TokenLogprobs]]:
        table, entries = batch.table, {}
        for row, num_new in zip(batch.rows.tolist(), batch.num_new_tokens.tolist(), strict=True):
            if row in self._prompt_logprob_rows:
                start = int(table.num_computed_tokens[row]) + 1
                end = min(start + num_new, int(table.num_prompt_tokens[row]))
                num_top = self._requests[row].sampling.prompt_logprobs or 0
                entries[row] = [
                    self._logprobs(token_id, num_top) for token_id in table.token_ids[row, start:end].tolist()
                ]
        return {row: values for row, values in entries.items() if values}

    def _step_seconds(self, batch: Batch) -> float:
        num_decodes, model = batch.num_decodes, self._model
        num_prefill_tokens = int(batch.num_new_tokens[num_decodes:].sum()) if num_decodes < batch.rows.size else 0
        num_decoded = num_decodes + (0 if batch.num_drafts is None else int(batch.num_drafts.sum()))
        return (
            model.base_ms * 1e-3 + model.decode_us * 1e-6 * num_decoded + model.prefill_us * 1e-6 * num_prefill_tokens
        )

    def _sleep_until(self, deadline: float) -> None:
        """Of time.monotonic; returns at once when it has passed."""
        while (remaining := deadline - time.monotonic()) > 0:
            self.progress.tick()
            time.sleep(min(remaining, _TICK_S))


def _key(request: Request) -> int:
    """64 bits from the prompt (not from tokens generated since) and, when sampling, from the seed."""
    digest = blake2b(request.token_ids[: request.num_prompt_tokens].tobytes(), digest_size=8)
    if not request.sampling.greedy:
        digest.update(request.sampling.seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(bits: UInt64) -> UInt64:
    """The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).

    In place: an array operation less costs more than arithmetic does here.
    """
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits
