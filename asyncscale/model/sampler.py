"""Chooses the next token of every sequence of a batch in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from asyncscale.engine.batch import Int32, SequenceTable
from asyncscale.engine.request import Request
from asyncscale.kernels.sampling import DRAW, SamplingKernels
from asyncscale.messages import TokenLogprobs
from asyncscale.model.bias import apply_bias, is_biased
from asyncscale.model.decoder import first_highest
from asyncscale.model.logprobs import token_logprobs
from asyncscale.model.penalties import RowPenalties, apply_penalties, is_penalized
from asyncscale.model.random_bits import uniforms
from asyncscale.params import Sampling

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

_NO_LOGPROBS = -1
_ROW = np.dtype(
    [
        ("random", "?"), ("biased", "?"), ("penalized", "?"), ("seed", "u8"), ("temperature", "f4"),
        ("top_k", "i4"), ("top_p", "f8"), ("min_p", "f4"), ("logprobs", "i4"),
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of each row asked for; those of rows in `errors` mean nothing. logprobs and errors: by row."""

    token_ids: Int32
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Samples with each request's own parameters; the meanings are vLLM's.

    ::

        sampler = Sampler(max_num_seqs, vocab_size, make_sampling_kernels(vocab_size))
        sampler.add(row, request)
        sampled = sampler.sample(logits, rows, table)
        sampler.remove(row)

    In order: log-probabilities of the raw logits; logit_bias, min_tokens, bad_words; repetition, frequency and presence
    penalty; then the most likely token (the lowest id of several) where greedy, else temperature, min_p, top_k, top_p
    and a draw. The draw depends on nothing but the row's logits, its seed and the new token's position.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, kernels: SamplingKernels) -> None:
        self._vocab_size = vocab_size
        self._kernels = kernels
        self._rows = np.zeros(max_num_seqs, _ROW)
        self._only_greedy = np.zeros(max_num_seqs, np.bool_)
        self._samplings: dict[int, Sampling] = {}
        self._penalties: dict[int, RowPenalties] = {}
        self._invalid: dict[int, str] = {}

    def add(self, row: int, request: Request) -> None:
        """`request` occupies `row` from now on; its token_ids are all tokens known so far."""
        sampling = request.sampling
        self._samplings[row] = sampling
        if error := _out_of_range(sampling, self._vocab_size):
            self._invalid[row] = error
        if is_penalized(sampling):
            self._penalties[row] = RowPenalties(request, self._vocab_size)
        top_k = sampling.top_k if 0 < sampling.top_k < self._vocab_size else 0
        logprobs = _NO_LOGPROBS if sampling.logprobs is None else min(sampling.logprobs, self._vocab_size)
        self._rows[row] = params = (
            not sampling.greedy, is_biased(sampling) and not error, is_penalized(sampling), sampling.seed % 2**64,
            sampling.temperature, top_k, sampling.top_p, sampling.min_p, logprobs,
        )  # fmt: skip
        self._only_greedy[row] = not any(params[:3]) and logprobs == _NO_LOGPROBS

    def remove(self, row: int) -> None:
        """The request in `row` left. Nothing happens when there is none."""
        for by_row in (self._samplings, self._penalties, self._invalid):
            by_row.pop(row, None)

    def sample(self, logits: Float32, rows: Int32, table: SequenceTable, positions: Int32 | None = None) -> Sampled:
        """The next token of each of `rows`.

        logits: float32[m, V], contiguous; overwritten. rows: int32[m]. table: as of before the step, so that the new
        token's position is table.num_tokens[row]. A row that has no token to choose is in `errors`; the others are
        unharmed.

        positions: int32[m], of the new tokens, where they are not all the next: several drafts of a row are verified
        at once. A row may then come several times, if nothing in its request looks at the tokens before or asks for
        log-probabilities.
        """
        if self.takes_best(rows):
            return self.take_best(rows, *first_highest(logits))
        if positions is None:
            positions = table.num_tokens[rows]
        params = self._rows[rows]
        asked = np.flatnonzero(params["logprobs"] != _NO_LOGPROBS)
        raw, at = logits, asked
        if (params["biased"] | params["penalized"])[asked].any():
            raw, at = logits[asked], np.arange(len(asked))
        self._process(logits, rows, params, table)

        token_ids, highest = first_highest(logits)
        errors = self._errors(rows, highest)
        random = np.flatnonzero(params["random"] & np.isfinite(highest))
        if random.size:
            draws = _draws(random, highest[random], params[random], positions[random])
            token_ids[random] = self._kernels.draw(logits, draws)
        entries = token_logprobs(self._kernels, raw, at, token_ids[asked], params["logprobs"][asked])
        logprobs = dict(zip(rows[asked].tolist(), entries, strict=True))
        for row in errors:
            logprobs.pop(row, None)
        return Sampled(token_ids.astype(np.int32), logprobs, errors)

    def takes_best(self, rows: Int32) -> bool:
        """Whether of all `rows` nothing but their highest logit matters."""
        return bool(self._only_greedy[rows].all())

    def take_best(self, rows: Int32, token_ids: Int64, highest: Float32) -> Sampled:
        """As `sample`, where `takes_best`, given what `first_highest` says of the logits."""
        return Sampled(token_ids.astype(np.int32), errors=self._errors(rows, highest))

    def prompt_logprobs(self, logits: Float32, token_ids: Int32, num_top: int) -> list[TokenLogprobs]:
        """Log-probabilities of `token_ids` (of a prompt) and of the `num_top` most likely tokens at each position.

        logits: float32[k, V], row i from the position before token_ids[i]. token_ids: int32[k].
        """
        rows = np.arange(len(token_ids))
        return token_logprobs(self._kernels, logits, rows, token_ids, np.full(len(rows), num_top, np.int32))

    def _process(self, logits: Float32, rows: Int32, params: npt.NDArray[np.void], table: SequenceTable) -> None:
        def generated(row: int) -> Int32:
            return table.token_ids[row, table.num_prompt_tokens[row] : table.num_tokens[row]]

        biased = np.flatnonzero(params["biased"]).tolist()
        if biased:
            samplings = [self._samplings[int(rows[i])] for i in biased]
            apply_bias(logits, biased, samplings, [generated(int(rows[i])) for i in biased])
        penalized = np.flatnonzero(params["penalized"]).tolist()
        if penalized:
            penalties = [self._penalties[int(rows[i])] for i in penalized]
            for i, row_penalties in zip(penalized, penalties, strict=True):
                row_penalties.update(generated(int(rows[i])))
            apply_penalties(logits, penalized, penalties)

    def _errors(self, rows: Int32, highest: npt.NDArray[np.float32]) -> dict[int, str]:
        finite = np.isfinite(highest)
        if finite.all() and not self._invalid:
            return {}
        bad = np.flatnonzero(~finite).tolist()
        errors = {int(rows[i]): _no_token(float(highest[i])) for i in bad}
        if self._invalid:
            errors.update((row, self._invalid[row]) for row in rows.tolist() if row in self._invalid)
        return errors


def _draws(indices: Int64, highest: Float32, params: npt.NDArray[np.void], positions: Int32) -> npt.NDArray[np.void]:
    """Of dtype DRAW, for the rows `indices` of the logits; the other arguments are of these rows."""
    draws = np.zeros(len(indices), DRAW)
    draws["index"], draws["highest"] = indices, highest
    draws["uniform"] = uniforms(params["seed"], positions)
    for name in ("temperature", "top_k", "top_p", "min_p"):
        draws[name] = params[name]
    return draws


def _no_token(highest: float) -> str:
    if highest == -np.inf:
        return "no token may come next: the logits of all are minus infinity"
    return f"the model computed a logit of {highest}"


def _out_of_range(sampling: Sampling, vocab_size: int) -> str | None:
    """What is wrong with the token ids in `sampling` that are used here, if anything."""
    used = {
        "logit_bias": [token_id for token_id, _ in sampling.logit_bias],
        "bad_words": [token_id for word in sampling.bad_words_token_ids for token_id in word],
        "stop_token_ids": sampling.stop_token_ids if sampling.min_tokens else (),
    }
    for name, token_ids in used.items():
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                return f"{name} has token id {token_id}, but the model's vocabulary has {vocab_size} tokens"
    return None
