from __future__ import annotations

import time

import numpy as np
import pytest

from asyncscale.config import EngineConfig, SimulatedModel
from asyncscale.engine.batch import Batch, SequenceTable
from asyncscale.engine.request import Request
from asyncscale.model.simulation import EOS_TOKEN_ID, SimulatedRunner
from asyncscale.params import Sampling

FAST = SimulatedModel(base_ms=0, decode_us=0, prefill_us=0, vocab_size=2000, mean_output_tokens=20)
PROMPT = list(range(9))


class Bench:
    """A runner with a table to execute single rows or several at will."""

    def __init__(self, model: SimulatedModel = FAST, num_rows: int = 4, **config: object) -> None:
        self.config = EngineConfig(max_num_seqs=num_rows, **config)  # type: ignore[arg-type]
        self.runner = SimulatedRunner(model, self.config)
        self.table = SequenceTable(num_rows, 6000, 16)

    def add(self, row: int, prompt: list[int], given: list[int] | None = None, **sampling: object) -> None:
        known = np.array([*prompt, *(given or [])], np.int32)
        resolved = Sampling(**{"max_tokens": 5000, **sampling})  # type: ignore[arg-type]
        self.runner.add(row, Request(b"", row, known, len(prompt), resolved))
        self.table.token_ids[row, : len(known)] = known
        self.table.num_tokens[row] = len(known)
        self.table.num_prompt_tokens[row] = len(prompt)
        self.table.num_computed_tokens[row] = 0

    def execute(self, counts: dict[int, int]):
        """Rows that are past their prompt decode, and come first as the scheduler has them."""
        past_prompt = self.table.num_computed_tokens >= self.table.num_prompt_tokens
        rows = sorted(counts, key=lambda row: not past_prompt[row])
        num_new_tokens = np.array([counts[row] for row in rows], np.int32)
        num_decodes = sum(bool(past_prompt[row]) for row in rows)
        return self.runner.execute(Batch(self.table, np.array(rows, np.int32), num_new_tokens, num_decodes))

    def decode(self, rows: list[int], count: int) -> list[list[int]]:
        """`count` tokens of each row, all rows in every step."""
        generated: list[list[int]] = [[] for _ in rows]
        for _ in range(count):
            remaining = self.table.num_tokens[rows] - self.table.num_computed_tokens[rows]
            result = self.execute(dict(zip(rows, remaining.tolist(), strict=True)))
            assert result.rows.tolist() == rows
            self.table.num_computed_tokens[rows] = self.table.num_tokens[rows]
            self.table.token_ids[rows, self.table.num_tokens[rows]] = result.token_ids
            self.table.num_tokens[rows] += 1
            for tokens, token_id in zip(generated, result.token_ids.tolist(), strict=True):
                tokens.append(token_id)
        return generated


def test_tokens_are_the_same_alone_in_a_crowd_and_on_another_row():
    alone = Bench()
    alone.add(0, PROMPT, temperature=1.0, seed=7)
    [expected] = alone.decode([0], 50)
    crowd = Bench()
    crowd.add(0, [3], temperature=1.0, seed=7)
    crowd.add(1, PROMPT, temperature=1.0, seed=8)
    crowd.add(3, PROMPT, temperature=1.0, seed=7)
    first, second, third = crowd.decode([0, 1, 3], 50)
    assert third == expected
    assert first != expected
    assert second != expected


def test_tokens_given_from_elsewhere_do_not_change_those_that_follow():
    whole = Bench()
    whole.add(0, PROMPT, temperature=1.0, seed=7)
    [expected] = whole.decode([0], 30)
    resumed = Bench()
    resumed.add(0, PROMPT, given=expected[:11], temperature=1.0, seed=7)
    assert resumed.decode([0], 19) == [expected[11:]]


def test_greedy_tokens_do_not_depend_on_the_seed():
    bench = Bench()
    for row in range(2):
        bench.add(row, PROMPT, temperature=0.0, seed=row)
    first, second = bench.decode([0, 1], 30)
    assert first == second


def test_about_one_token_in_mean_output_tokens_ends_the_sequence_and_the_others_spread_over_the_vocabulary():
    bench = Bench()
    bench.add(0, PROMPT, temperature=1.0, seed=1)
    [token_ids] = bench.decode([0], 4000)
    assert token_ids.count(EOS_TOKEN_ID) == pytest.approx(200, abs=60)  # 4 standard deviations
    others = [token_id for token_id in token_ids if token_id != EOS_TOKEN_ID]
    assert min(others) > EOS_TOKEN_ID
    assert max(others) < 2000
    assert len(set(others)) > 1300  # of 1743, 3800 uniform draws are expected to hit 1546


def test_no_stop_token_comes_before_min_tokens_and_other_positions_are_unchanged():
    free, bound = Bench(), Bench()
    free.add(0, PROMPT, temperature=1.0, seed=1)
    [expected] = free.decode([0], 300)
    banned, end = expected[5], expected.index(EOS_TOKEN_ID, 200)
    bound.add(0, PROMPT, temperature=1.0, seed=1, min_tokens=end, stop_token_ids=(EOS_TOKEN_ID, banned))
    [token_ids] = bound.decode([0], 300)
    assert not {EOS_TOKEN_ID, banned} & set(token_ids[:end])
    assert EOS_TOKEN_ID in expected[:end]
    assert token_ids[end:] == expected[end:]
    replaced = [before for before, after in zip(expected, token_ids, strict=True) if before != after]
    assert replaced == [token_id for token_id in expected[:end] if token_id in (EOS_TOKEN_ID, banned)]


def test_a_row_that_may_produce_no_token_at_all_fails_alone():
    bench = Bench()
    bench.add(0, PROMPT)
    bench.add(1, PROMPT, min_tokens=1, stop_token_ids=tuple(range(EOS_TOKEN_ID, 2000)))
    result = bench.execute({0: len(PROMPT), 1: len(PROMPT)})
    assert list(result.errors) == [1]


def test_only_rows_that_are_complete_get_a_token():
    bench = Bench()
    bench.add(0, PROMPT)
    bench.add(2, PROMPT)
    result = bench.execute({0: 8, 2: 9})
    assert result.rows.tolist() == [2]
    assert len(result.token_ids) == 1


def test_logprobs_hold_the_chosen_token_first_and_as_many_others_as_asked():
    bench = Bench()
    for row, num_top in enumerate([None, 0, 3]):
        bench.add(row, PROMPT, logprobs=num_top)
    result = bench.execute(dict.fromkeys(range(3), len(PROMPT)))
    assert result.logprobs.keys() == {1, 2}
    for row, num_top in ((1, 0), (2, 3)):
        entry = result.logprobs[row]
        assert entry.token_ids[0] == result.token_ids[row]
        assert len(entry.token_ids) == len(entry.logprobs) == 1 + num_top
        assert (entry.logprobs[0], entry.rank) == (0.0, 1)
        assert len(set(entry.token_ids[1:])) == num_top


def test_prompt_logprobs_come_with_the_chunk_that_computes_them():
    bench = Bench()
    bench.add(0, PROMPT, prompt_logprobs=1)
    scored = []
    for count in (4, 4, 1):
        entries = bench.execute({0: count}).prompt_logprobs.get(0, [])
        scored.append([entry.token_ids[0] for entry in entries])
        bench.table.num_computed_tokens[0] += count
    assert scored == [[1, 2, 3, 4], [5, 6, 7, 8], []]


def test_a_step_takes_as_long_as_the_model_says(monkeypatch):
    clock, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    bench = Bench(SimulatedModel(base_ms=8, decode_us=35, prefill_us=10, load_s=2.5))
    assert slept.pop() == 2.5
    bench.add(0, PROMPT)
    bench.add(1, PROMPT, given=[300])
    bench.add(2, PROMPT)
    bench.table.num_computed_tokens[:3] = [0, 9, 8]  # a prefill, a decode, and the last token of a prompt
    bench.execute({0: 9, 1: 1, 2: 1})
    assert slept.pop() == pytest.approx(8e-3 + 35e-6 + 10 * 10e-6)


def test_nothing_is_slept_when_the_step_took_no_time(monkeypatch):
    bench = Bench()
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
    bench.add(0, PROMPT)
    bench.execute({0: 9})


def test_the_config_overrides_the_models_sizes():
    model = SimulatedModel(max_model_len=100, num_kv_blocks=50, load_s=0)
    runner = SimulatedRunner(model, EngineConfig())
    assert (runner.vocab_size, runner.max_model_len, runner.num_blocks) == (32_000, 100, 50)
    runner = SimulatedRunner(model, EngineConfig(max_model_len=64, num_kv_blocks=7))
    assert (runner.max_model_len, runner.num_blocks) == (64, 7)


@pytest.mark.parametrize("fields", [{"vocab_size": 257}, {"mean_output_tokens": 0}])
def test_a_model_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SimulatedRunner(SimulatedModel(**fields), EngineConfig())


def test_replies_are_recited_by_prompt_and_position_and_others_answer_as_ever():
    scripted = SimulatedModel(base_ms=0, decode_us=0, prefill_us=0, vocab_size=2000, replies={"hi": "Hé", "h": "no"})
    bench = Bench(scripted)
    bench.add(0, list(b"say hi"))
    bench.add(1, list(b"h"), given=list(b"n"))  # a request that was moved after its first token
    bench.add(2, PROMPT)
    first, moved, other = bench.decode([0, 1, 2], 5)
    assert first == [*"Hé".encode(), EOS_TOKEN_ID, EOS_TOKEN_ID]
    assert moved == [ord("o"), *[EOS_TOKEN_ID] * 4]
    assert len(set(other)) > 2
    bench.runner.remove(0)
    bench.add(0, PROMPT)
    assert EOS_TOKEN_ID not in bench.decode([0], 2)[0]
