"""Which rows guess their next tokens, and how many: as many as pay."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from asyncscale.config import EngineConfig
from asyncscale.engine.batch import Int32, SequenceTable
from asyncscale.engine.ngram import NgramIndex
from asyncscale.engine.request import Request
from asyncscale.params import Sampling

_MAX_ROWS = 16  # with more, a step is bound by arithmetic, and guesses by Python
_FIRST_CHANCE, _LEAST_CHANCE, _GREATEST_CHANCE = 0.5, 0.01, 0.99
_MEMORY = 0.85  # how much of a row's estimate is left after one more guess
_FIRST_PAUSE, _MAX_PAUSE = 4, 256  # tokens


@dataclass(slots=True)
class _Row:
    """chance: that its next guess is right, by those before. It makes none until it has `resume_at` tokens.

    limit: of its tokens. pause: for how many tokens it guesses nothing, the next time that guesses do not pay.
    """

    stop_token_ids: frozenset[int]
    resume_at: int
    limit: int
    index: NgramIndex = field(default_factory=NgramIndex)
    chance: float = _FIRST_CHANCE
    pause: int = _FIRST_PAUSE


class Drafter:
    """Guesses tokens of decoding rows by n-grams. A RowListener.

    ::

        for index, token_ids in drafter.draft(rows, budget): ...
        drafter.record(row, num_drafted, num_accepted)

    With chance p for each guess to be right, given that those before it are, the d-th in a row makes a token with p**d.
    In a step of n rows it costs token_cost of the part of a step that is paid once; a step makes n tokens for
    1 + n * token_cost. So a guess pays while p**d exceeds n * token_cost / (1 + n * token_cost). A row for which the
    first does not pay tries one after a pause, which doubles each time that it misses.

    Rows that ask for log-probabilities, or for what depends on the tokens before, draft nothing. No guess is a stop
    token: so only the last token that a row gets in a step can end it.

    Raises nothing; the same rows with the same tokens always give the same drafts.
    """

    def __init__(self, table: SequenceTable, config: EngineConfig, token_cost: float) -> None:
        self.num_drafted = 0
        self.num_accepted = 0
        self._table = table
        self._max_drafts = config.num_speculative_tokens
        self._always = config.speculation == "ngram"
        self._max_rows = config.max_num_seqs if self._always else min(_MAX_ROWS, config.max_num_seqs)
        self._token_cost = token_cost
        self._least_chance = 0.0  # that a guess must have in this step
        self._rows: dict[int, _Row] = {}

    def add(self, row: int, request: Request) -> None:
        sampling = request.sampling
        if may_draft(sampling):
            limit = min(request.num_prompt_tokens + sampling.max_tokens, self._table.token_ids.shape[1])
            resume_at = request.num_prompt_tokens + sampling.min_tokens
            self._rows[row] = _Row(frozenset(sampling.stop_token_ids), resume_at, limit)

    def remove(self, row: int) -> None:
        self._rows.pop(row, None)

    def draft(self, rows: Int32, budget: int) -> list[tuple[int, list[int]]]:
        """Guesses for decoding `rows`, `budget` of them in all: (index into rows, token ids) where there are any."""
        if not self._rows or rows.size > self._max_rows or budget <= 0:
            return []
        cost = rows.size * self._token_cost
        self._least_chance = 0.0 if self._always else cost / (1 + cost)
        drafts = []
        num_tokens = self._table.num_tokens[rows].tolist()
        for index, (row, known) in enumerate(zip(rows.tolist(), num_tokens, strict=True)):
            state = self._rows.get(row)
            if state is None or known < state.resume_at:
                continue
            length = min(self._length(state.chance), state.limit - known - 1, budget)
            if length > 0:
                state.index.extend(self._table.token_ids[row, len(state.index) : known].tolist())
                token_ids = _up_to_stop(state.index.propose(length), state.stop_token_ids)
                if token_ids:
                    budget -= len(token_ids)
                    drafts.append((index, token_ids))
        return drafts

    def record(self, row: int, num_drafted: int, num_accepted: int) -> None:
        """What came of a row's guesses in a step. The table is as of before it."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        state = self._rows[row]
        chance = 1 - (1 - state.chance) * _MEMORY**num_accepted
        if num_accepted < num_drafted:
            chance *= _MEMORY
        state.chance = min(max(chance, _LEAST_CHANCE), _GREATEST_CHANCE)
        if num_accepted:
            state.pause = _FIRST_PAUSE
        elif state.chance <= self._least_chance:
            state.resume_at = int(self._table.num_tokens[row]) + state.pause
            state.pause = min(2 * state.pause, _MAX_PAUSE)

    def _length(self, chance: float) -> int:
        """How many guesses pay; at least one, to find out."""
        least = self._least_chance
        if least == 0:
            return self._max_drafts
        return max(1, min(self._max_drafts, int(math.log(least) / math.log(chance))))


def may_draft(sampling: Sampling) -> bool:
    """Whether each token of such a request is chosen by its own logits, seed and position alone, and nothing else is
    asked about it."""
    return (
        sampling.repetition_penalty == 1
        and sampling.presence_penalty == sampling.frequency_penalty == 0
        and not (sampling.logit_bias or sampling.bad_words_token_ids)
        and sampling.logprobs is sampling.prompt_logprobs is None
    )


def _up_to_stop(token_ids: list[int], stop_token_ids: frozenset[int]) -> list[int]:
    if stop_token_ids.isdisjoint(token_ids):
        return token_ids
    return token_ids[: next(i for i, token_id in enumerate(token_ids) if token_id in stop_token_ids)]
