"""Tiny random checkpoints; and a driver that stands in for the scheduler, for any batches and any block tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import random_model

from asyncscale.config import CheckpointFiles, EngineConfig, EngineSpec
from asyncscale.engine.batch import Batch, SequenceTable, StepResult
from asyncscale.engine.request import Request
from asyncscale.model.expert_exchange import RowGroup
from asyncscale.model.runner import ModelRunner
from asyncscale.params import Sampling

BLOCK_SIZE = 4


class Driver:
    """Runs prompts greedily to `max_tokens` each; every sequence's blocks are scattered over the cache at random.

    Each step holds one chunk (of at most `chunk` tokens) of every sequence that has begun, decodes included. `wave`
    more sequences begin with each step, so that later ones compute their prompts while earlier ones decode.
    """

    def __init__(self, runner: ModelRunner, max_num_seqs: int, seed: int = 0) -> None:
        self.runner = runner
        self.table = SequenceTable(max_num_seqs, runner.max_model_len, BLOCK_SIZE)
        self.logprobs: list[list[list[float]]] = []
        self.prompt_logprobs: dict[int, list[list[float]]] = {}
        self._free = np.random.default_rng(seed).permutation(runner.num_blocks).tolist()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        chunk: int = 512,
        wave: int = 512,
        top: int = 0,
        num_prompt_tokens: int | None = None,
    ) -> list[list[int]]:
        """The generated tokens of each prompt. wave: how many sequences begin at once. top: logprobs per position.

        num_prompt_tokens: how many of each prompt's tokens were not generated earlier; None is all.
        """
        sampling = Sampling(max_tokens=max_tokens, logprobs=top or None, prompt_logprobs=top or None)
        self.logprobs = [[] for _ in prompts]
        self.prompt_logprobs = {row: [] for row in range(len(prompts))}
        lengths = np.array([len(prompt) + max_tokens for prompt in prompts], np.int32)
        for row, prompt in enumerate(prompts):
            self._place(row, prompt, int(lengths[row]))
            if num_prompt_tokens is not None:
                self.table.num_prompt_tokens[row] = num_prompt_tokens
            self.runner.add(row, Request(b"", row, np.array(prompt, np.int32), len(prompt), sampling))
        begun = 0
        while (self.table.num_tokens[: len(prompts)] < lengths).any():
            begun = min(begun + wave, len(prompts))
            rows = np.flatnonzero(self.table.num_tokens[:begun] < lengths[:begun]).astype(np.int32)
            self._step(rows, chunk)
        for row in range(len(prompts)):
            self.runner.remove(row)
        return [self.table.token_ids[i, len(p) : lengths[i]].tolist() for i, p in enumerate(prompts)]

    def _place(self, row: int, prompt: Sequence[int], length: int) -> None:
        num_blocks = -(-length // BLOCK_SIZE)
        self.table.block_table[row, :num_blocks] = [self._free.pop() for _ in range(num_blocks)]
        self.table.token_ids[row, : len(prompt)] = prompt
        self.table.num_tokens[row] = self.table.num_prompt_tokens[row] = len(prompt)
        self.table.num_computed_tokens[row] = 0

    def _step(self, rows: np.ndarray, chunk: int) -> None:
        table = self.table
        counts = np.minimum(table.num_tokens[rows] - table.num_computed_tokens[rows], chunk)
        result = self.runner.execute(Batch(table, rows, counts))
        assert not result.errors
        table.num_computed_tokens[rows] += counts
        complete = rows[table.num_computed_tokens[rows] == table.num_tokens[rows]]
        assert result.rows.tolist() == complete.tolist()
        table.token_ids[complete, table.num_tokens[complete]] = result.token_ids
        table.num_tokens[complete] += 1
        self._keep_logprobs(result)

    def _keep_logprobs(self, result: StepResult) -> None:
        for row, entry in result.logprobs.items():
            self.logprobs[row].append(entry.logprobs)
        for row, entries in result.prompt_logprobs.items():
            self.prompt_logprobs[row] += [entry.logprobs for entry in entries]


@pytest.fixture(autouse=True)
def weight_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random checkpoints leave nothing in the user's own cache."""
    monkeypatch.setenv("ASYNCSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """See random_models.py."""
    return random_model


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., CheckpointFiles]:
    """Writes a transformers model as a Hugging Face folder; keywords go to its save_pretrained."""

    def save_model(model: Any, **options: object) -> CheckpointFiles:
        model.save_pretrained(tmp_path / "folder", **options)
        return CheckpointFiles(name="tiny", format="safetensors", path=str(tmp_path / "folder"))

    return save_model


@pytest.fixture
def make_runner() -> Callable[..., ModelRunner]:
    """A float32 runner of checkpoint files; keywords go to EngineConfig, but for `group`."""

    def make(files: CheckpointFiles, group: RowGroup | None = None, **config: Any) -> ModelRunner:
        options: dict[str, Any] = {"dtype": "float32", "block_size": BLOCK_SIZE, "num_kv_blocks": 512}
        options |= {"threads_per_engine": 1} | config
        return ModelRunner(
            EngineSpec(
                engine_id=0, incarnation=0, num_engines=1, folder="", model=files,
                config=EngineConfig(**options),
            ),
            group=group,
        )  # fmt: skip

    return make


@pytest.fixture
def drive() -> type[Driver]:
    return Driver
