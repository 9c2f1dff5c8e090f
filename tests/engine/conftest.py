"""An engine core over a simulated model that keeps a KV cache of its own and audits every batch that it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from asyncscale.config import EngineConfig, SimulatedModel
from asyncscale.engine.batch import Batch, SequenceTable, StepResult
from asyncscale.engine.core import EngineCore
from asyncscale.engine.request import Request
from asyncscale.messages import Add, Finished, Load, Started, TokenLogprobs
from asyncscale.model.simulation import SimulatedRunner
from asyncscale.params import Sampling

Key = tuple[bytes, int]
MODEL = SimulatedModel(base_ms=0, decode_us=0, prefill_us=0, vocab_size=1000, mean_output_tokens=12)


class AuditingRunner(SimulatedRunner):
    """Writes, for each position, a digest of the whole prefix up to it into its block, and reads it back.

    A block that is shared, given away or cached wrongly is then seen as a wrong digest.
    """

    def __init__(self, model: SimulatedModel, config: EngineConfig) -> None:
        super().__init__(model, config)
        self.config = config
        self.cache = np.zeros((self.num_blocks, config.block_size), np.int64)
        self.batches: list[list[tuple[Key, int]]] = []  # of each step: (request, tokens computed)
        self.failures: dict[Key, str] = {}  # requests whose next step is to fail
        self.before_execute: Callable[[], None] = lambda: None

    def execute(self, batch: Batch, meanwhile: Callable[[], None] = lambda: None) -> StepResult:
        meanwhile()
        self.before_execute()
        rows, counts = batch.rows.tolist(), batch.num_new_tokens.tolist()
        self.batches.append([(self._requests[row].key, count) for row, count in zip(rows, counts, strict=True)])
        assert len(set(rows)) == len(rows) <= self.config.max_num_seqs
        assert sum(counts) <= self.config.max_num_batched_tokens
        num_drafts = np.zeros(len(rows), np.int32) if batch.num_drafts is None else batch.num_drafts
        assert not num_drafts[batch.num_decodes :].any()
        for row, count, drafts in zip(rows, counts, num_drafts.tolist(), strict=True):
            self._compute(batch.table, row, count, drafts)
        result = super().execute(batch)
        for row in rows:
            error = self.failures.pop(self._requests[row].key, None)
            if error is not None:
                result.errors[row] = error
        return result

    def _compute(self, table: SequenceTable, row: int, count: int, num_drafts: int) -> None:
        start, size = int(table.num_computed_tokens[row]), table.block_size
        end = start + count
        assert 0 < count - num_drafts <= table.num_tokens[row] - start
        assert end <= table.num_blocks[row] * size
        positions = np.arange(end)
        slots = table.block_table[row, positions // size], positions % size
        digests, digest = [], 1
        for token_id in table.token_ids[row, :end].tolist():
            digest = (digest * 1_000_003 + token_id + 1) % (2**61 - 1)
            digests.append(digest)
        self.cache[slots[0][start:], slots[1][start:]] = digests[start:]
        assert self.cache[slots].tolist() == digests, f"row {row} reads keys and values that are not its own"


@dataclass
class Received:
    """All that one request's client was sent."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: Finished | None = None
    started: Started | None = None
    num_preemptions: int = 0


class Engine:
    """An EngineCore with a client's view of it; the clock ticks once per look."""

    def __init__(self, model: SimulatedModel, **config: object) -> None:
        self.config = EngineConfig(**{"enable_prefix_caching": True, "block_size": 4, **config})  # type: ignore[arg-type]
        self.runner = AuditingRunner(model, self.config)
        self.time = 0.0
        self.core = EngineCore(self.runner, self.config, clock=self.tick)
        self.received: dict[Key, Received] = {}
        self.loads: dict[bytes, Load] = {}
        self.num_steps = 0

    def tick(self) -> float:
        self.time += 1.0
        return self.time

    def add(
        self,
        request_id: int,
        prompt: Sequence[int],
        *,
        client: bytes = b"a",
        n: int = 1,
        priority: int = 0,
        weight: int = 0,
        given: Sequence[int] = (),
        **sampling: object,
    ) -> None:
        """Add a request; `given` are tokens generated elsewhere. Its choices appear in `received`."""
        for choice in range(n):
            self.received.setdefault((client, request_id + choice), Received())
        token_ids = np.array([*prompt, *given], "<i4").tobytes()
        resolved = Sampling(**{"max_tokens": 16, "stop_token_ids": (256,), **sampling})  # type: ignore[arg-type]
        self.core.add(client, Add(request_id, token_ids, len(prompt), resolved, n, priority, weight))

    def step(self) -> None:
        outputs = self.core.step()
        self.num_steps += 1
        self.core.check_integrity()
        for client, output in outputs.items():
            self.loads[client] = output.load
            for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
                self._open(client, request_id).token_ids.append(token_id)
            for index, entry in output.logprobs:
                assert entry.token_ids[0] == output.token_ids[index]
                self._open(client, output.request_ids[index]).logprobs.append(entry)
            for request_id, entries in output.prompt_logprobs:
                self._open(client, request_id).prompt_logprobs.extend(entries)
            for started in output.started:
                assert self._open(client, started.request_id).started is None, "it can start but once"
                self._open(client, started.request_id).started = started
            for request_id in output.preempted:
                self._open(client, request_id).num_preemptions += 1
            for finished in output.finished:
                self._open(client, finished.request_id).finished = finished

    def _open(self, client: bytes, request_id: int) -> Received:
        received = self.received[client, request_id]
        assert received.finished is None, f"{client!r} got something for {request_id} after its end"
        return received

    def run(self, max_steps: int = 2000) -> None:
        """Step until there is nothing left to do."""
        for _ in range(max_steps):
            if not self.core.has_work:
                break
            self.step()
        assert not self.core.has_work, f"not done after {max_steps} steps"
        assert self.core.load(b"").used_blocks == 0

    def tokens(self, request_id: int, client: bytes = b"a") -> list[int]:
        return self.received[client, request_id].token_ids

    def finished(self, request_id: int, client: bytes = b"a") -> Finished:
        finished = self.received[client, request_id].finished
        assert finished is not None, f"{client!r}'s request {request_id} has not ended"
        return finished

    def started(self, request_id: int, client: bytes = b"a") -> Started:
        started = self.received[client, request_id].started
        assert started is not None, f"{client!r}'s request {request_id} has not started"
        return started

    def num_preemptions(self, request_id: int, client: bytes = b"a") -> int:
        return self.received[client, request_id].num_preemptions

    def num_computed(self, request_id: int, client: bytes = b"a") -> int:
        """How many tokens of this request were computed, those computed again after a preemption included."""
        return sum(count for batch in self.runner.batches for key, count in batch if key == (client, request_id))


def solo(
    model: SimulatedModel, prompt: Sequence[int], sampling: Sampling, max_model_len: int
) -> tuple[list[int], str, int | None]:
    """Tokens, finish reason and stop token of a request computed alone, token by token, without scheduler or core."""
    runner = SimulatedRunner(model, EngineConfig(max_num_seqs=1, max_model_len=max_model_len))
    table = SequenceTable(1, max_model_len + 1, 16)
    known = np.array(prompt, np.int32)
    runner.add(0, Request(b"", 0, known, len(prompt), sampling))
    table.num_prompt_tokens[0] = len(prompt)
    token_ids: list[int] = []
    while True:
        sequence = [*prompt, *token_ids]
        table.token_ids[0, : len(sequence)] = sequence
        table.num_tokens[0], table.num_computed_tokens[0] = len(sequence), len(sequence) - 1
        result = runner.execute(Batch(table, np.zeros(1, np.int32), np.ones(1, np.int32)))
        token_ids.append(int(result.token_ids[0]))
        if token_ids[-1] in sampling.stop_token_ids and len(token_ids) > sampling.min_tokens:
            return token_ids, "stop", token_ids[-1]
        if len(token_ids) == sampling.max_tokens or len(prompt) + len(token_ids) == max_model_len:
            return token_ids, "length", None


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """make_engine(**EngineConfig fields, model=...) -> Engine."""

    def make(model: SimulatedModel = MODEL, **config: object) -> Engine:
        defaults: dict[str, object] = {"num_kv_blocks": 200, "max_model_len": 256, "max_num_seqs": 8}
        return Engine(model, **{**defaults, "max_num_batched_tokens": 64, **config})

    return make


@pytest.fixture
def run_solo() -> Callable[..., tuple[list[int], str, int | None]]:
    """run_solo(prompt, **Sampling fields) -> (tokens, finish reason, stop token) of an undisturbed request."""

    def run(  # type: ignore[no-untyped-def]
        prompt: Sequence[int],
        *,
        model: SimulatedModel = MODEL,
        max_model_len: int = 256,
        choice: int = 0,
        **sampling: object,
    ):
        fields: dict[str, object] = {"max_tokens": 16, "stop_token_ids": (256,), **sampling}
        fields["seed"] = (int(fields.get("seed", 0)) + choice) % 2**64  # type: ignore[call-overload]
        return solo(model, prompt, Sampling(**fields), max_model_len)  # type: ignore[arg-type]

    return run


@pytest.fixture
def endless() -> dict[str, object]:
    """Sampling fields of a request that no token ends."""
    return {"stop_token_ids": (), "temperature": 1.0}
