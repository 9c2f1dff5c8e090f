"""What is computed of a token is bit by bit the same whatever is computed beside it: guesses are checked by that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from asyncscale.config import CheckpointFiles
from asyncscale.engine.batch import Batch, SequenceTable
from asyncscale.kernels.library import INSTRUCTION_SETS, load_library
from asyncscale.model import decoder
from asyncscale.model.runner import ModelRunner

BLOCK_SIZE = 4
LENGTH = 24
NUM_ROWS = 3
SIZES = {"hidden_size": 192, "intermediate_size": 240, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def token_ids() -> npt.NDArray[np.int32]:
    return np.random.default_rng(0).integers(0, 300, (NUM_ROWS, LENGTH)).astype(np.int32)


def logits(
    runner: ModelRunner, token_ids: npt.NDArray[np.int32], steps: Sequence[Sequence[int]]
) -> npt.NDArray[np.float32]:
    """[rows, tokens, vocabulary] of sequences of which each step computes so many tokens of each."""
    table = SequenceTable(NUM_ROWS, LENGTH, BLOCK_SIZE)
    table.token_ids[:] = token_ids
    table.num_tokens[:] = table.num_prompt_tokens[:] = LENGTH
    blocks = np.random.default_rng(1).permutation(runner.num_blocks)[: table.block_table.size]
    table.block_table[:] = blocks.reshape(table.block_table.shape)
    found = np.zeros((NUM_ROWS, LENGTH, runner.vocab_size), np.float32)
    for counts in np.array(steps, np.int32):
        rows = np.flatnonzero(counts).astype(np.int32)
        runner.forward(Batch(table, rows, counts[rows]))
        values = iter(runner.decoder.logits(np.arange(counts.sum())))
        for row in rows:
            for position in range(table.num_computed_tokens[row], table.num_computed_tokens[row] + counts[row]):
                found[row, position] = next(values)
        table.num_computed_tokens[:] += counts
    assert (table.num_computed_tokens == LENGTH).all()
    return found


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("weights", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3"])  # biases; norms of queries and keys
def test_logits_are_the_same_alone_in_a_crowd_and_in_chunks(
    isa: str,
    weights: str,
    architecture: str,
    token_ids: npt.NDArray[np.int32],
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
    make_runner: Callable[..., ModelRunner],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = load_library(isa)
    if library is None:
        pytest.skip(f"there is no library for {isa}, or this CPU has no {isa}")
    monkeypatch.setattr(decoder, "load_library", lambda: library)
    files = save(make_model(architecture, **SIZES))
    config: dict[str, Any] = {"quantization": "int8"} if weights == "int8" else {"dtype": weights}
    runner = make_runner(files, **config)
    alone = np.eye(NUM_ROWS, dtype=np.int32).repeat(LENGTH, 0)
    expected = logits(runner, token_ids, alone)
    assert np.isfinite(expected).all()
    for chunk in (1, 2, 3, 5, 8, LENGTH):
        whole, rest = divmod(LENGTH, chunk)
        steps = [[chunk] * NUM_ROWS] * whole + [[rest] * NUM_ROWS] * (rest > 0)
        assert np.array_equal(logits(runner, token_ids, steps), expected), f"{chunk} tokens of each at once"
    ragged = [[1, 7, 0], [4, 1, 9], [1, 1, 1], [9, 0, 2], [LENGTH - 15, LENGTH - 9, LENGTH - 12]]
    assert np.array_equal(logits(runner, token_ids, ragged), expected)
