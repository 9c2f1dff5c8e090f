"""Who guesses, when, and how many tokens."""

from __future__ import annotations

import numpy as np
import pytest

from asyncscale.config import EngineConfig
from asyncscale.engine.batch import SequenceTable
from asyncscale.engine.drafting import Drafter
from asyncscale.engine.request import Request
from asyncscale.params import Sampling

MAX_MODEL_LEN = 4000
REPETITIVE = [1, 2, 3, 4, 5, 6, 7, 8, 9] * 2


class Rows:
    """A drafter and its table."""

    def __init__(self, token_cost: float = 0.1, **config: object) -> None:
        self.config = EngineConfig(**config)  # type: ignore[arg-type]
        self.table = SequenceTable(self.config.max_num_seqs, MAX_MODEL_LEN, 16)
        self.drafter = Drafter(self.table, self.config, token_cost)

    def add(self, row: int, prompt: list[int] = REPETITIVE, generated: int = 1, **sampling: object) -> Rows:
        fields: dict[str, object] = {"max_tokens": MAX_MODEL_LEN, **sampling}
        resolved = Sampling(**fields)  # type: ignore[arg-type]
        num_prompt_tokens = len(prompt) - generated
        self.table.token_ids[row, : len(prompt)] = prompt
        self.table.num_tokens[row] = len(prompt)
        self.drafter.add(row, Request(b"", row, np.array(prompt, np.int32), num_prompt_tokens, resolved))
        return self

    def draft(self, *rows: int, budget: int = 100) -> dict[int, list[int]]:
        drafts = self.drafter.draft(np.array(rows, np.int32), budget)
        return {rows[index]: token_ids for index, token_ids in drafts}

    def miss(self, row: int, num_steps: int, in_company: int = 0) -> list[int]:
        """How many tokens were guessed in each of so many steps, all of them wrong; the text stays guessable."""
        lengths = []
        for _ in range(num_steps):
            drafts = self.draft(row, *range(100, 100 + in_company)).get(row, [])
            lengths.append(len(drafts))
            if drafts:
                self.drafter.record(row, len(drafts), 0)
            self.go_on(row, 1)
        return lengths

    def go_on(self, row: int, num_tokens: int) -> None:
        """So many more tokens of the same text."""
        for _ in range(num_tokens):
            known = self.table.num_tokens[row]
            self.table.token_ids[row, known] = REPETITIVE[known % 9]
            self.table.num_tokens[row] += 1


def test_the_guess_is_what_followed_before():
    rows = Rows(speculation="ngram", num_speculative_tokens=5).add(0).add(3, [1, 2, 3, 4, 5])
    assert rows.draft(0, 3) == {0: [1, 2, 3, 4, 5]}


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"logit_bias": ((3, 1.0),)},
        {"bad_words_token_ids": ((3,),)},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"min_tokens": 2},
    ],
)
def test_a_token_that_depends_on_more_than_its_own_logits_is_not_guessed(sampling):
    assert Rows(speculation="ngram").add(0, **sampling).draft(0) == {}
    assert Rows(speculation="ngram").add(0).draft(0)


def test_guesses_begin_when_min_tokens_is_reached():
    assert Rows(speculation="ngram").add(0, generated=2, min_tokens=2).draft(0)


def test_no_guess_is_beyond_the_end():
    assert Rows(speculation="ngram").add(0, max_tokens=4).draft(0) == {0: [1, 2]}
    assert Rows(speculation="ngram").add(0, max_tokens=2).draft(0) == {}
    full = [*range(100, 100 + MAX_MODEL_LEN - len(REPETITIVE) - 3), *REPETITIVE]
    assert Rows(speculation="ngram").add(0, full).draft(0) == {0: [1, 2]}


def test_no_guess_is_a_stop_token():
    assert Rows(speculation="ngram").add(0, stop_token_ids=(4, 77)).draft(0) == {0: [1, 2, 3]}
    assert Rows(speculation="ngram").add(0, stop_token_ids=(1,)).draft(0) == {}


def test_the_budget_is_for_all_rows_together():
    rows = Rows(speculation="ngram", num_speculative_tokens=5).add(0).add(1).add(2)
    assert {row: len(tokens) for row, tokens in rows.draft(0, 1, 2, budget=7).items()} == {0: 5, 1: 2}
    assert rows.draft(0, budget=0) == {}


def test_a_row_that_left_guesses_nothing_and_its_successor_starts_anew():
    rows = Rows(speculation="ngram").add(0)
    rows.drafter.remove(0)
    assert rows.draft(0) == {}
    rows.add(0, [7, 7, 7])
    assert set(rows.draft(0)[0]) == {7}


def test_more_is_guessed_of_what_was_right_and_less_of_what_was_wrong():
    rows = Rows().add(0)
    first = len(rows.draft(0)[0])
    rows.drafter.record(0, first, first)
    assert first < len(rows.draft(0)[0]) <= rows.config.num_speculative_tokens
    wrong = Rows().add(0)
    wrong.drafter.record(0, 8, 0)
    assert len(wrong.draft(0)[0]) < first


def test_the_dearer_a_token_and_the_fuller_the_batch_the_fewer_are_guessed():
    by_cost = [len(Rows(cost).add(0).draft(0)[0]) for cost in (0.0, 0.05, 0.2, 1.0)]
    assert by_cost == sorted(by_cost, reverse=True)
    assert by_cost[0] == 8 > by_cost[-1]
    by_company = [len(Rows().add(0).draft(0, *range(1, n))[0]) for n in (1, 4, 16)]
    assert by_company == sorted(by_company, reverse=True)
    assert by_company[0] > by_company[-1]
    assert Rows().add(0).draft(0, *range(1, 17)) == {}


def test_a_row_that_keeps_missing_tries_ever_less_often():
    lengths = Rows().add(0).miss(0, 1000)
    assert sum(lengths) < 25
    tries = [step for step, length in enumerate(lengths) if length][-6:]
    pauses = np.diff(tries)
    assert (pauses[1:] >= np.minimum(1.9 * pauses[:-1], 200)).all()
    assert lengths[tries[-1]] == 1


def test_it_is_back_at_once_when_a_guess_is_right():
    rows = Rows().add(0)
    rows.miss(0, 1000)
    while not rows.draft(0):
        rows.miss(0, 1)
    rows.drafter.record(0, 1, 1)
    rows.go_on(0, 2)
    assert rows.draft(0)


def test_estimates_of_a_long_run_stay_estimates():
    rows = Rows().add(0)
    for _ in range(1000):
        rows.drafter.record(0, 8, 8)
    assert len(rows.draft(0)[0]) == 8
    for _ in range(10_000):
        rows.drafter.record(0, 1, 0)
    rows.go_on(0, 300)
    assert len(rows.draft(0)[0]) == 1
