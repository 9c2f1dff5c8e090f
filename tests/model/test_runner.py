"""The runner: what it says about itself, how it sizes its cache, and its results batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from group_of_threads import GroupOfThreads, Member

from asyncscale.config import CheckpointFiles, EngineConfig, EngineSpec
from asyncscale.engine.batch import Batch, SequenceTable
from asyncscale.engine.request import Request
from asyncscale.errors import ModelLoadError
from asyncscale.kernels.library import load_library
from asyncscale.model import decoder, native_decoder, torch_decoder
from asyncscale.model.runner import ModelRunner
from asyncscale.model.threads import num_threads
from asyncscale.params import Sampling

BLOCK_SIZE = 16
# keys and values, 3 layers, 2 heads of 16 values in float32
BLOCK_BYTES = 2 * 3 * 2 * 16 * 4 * BLOCK_SIZE


@pytest.fixture
def files(make_model: Callable[..., Any], save: Callable[..., CheckpointFiles]) -> CheckpointFiles:
    return save(make_model("Llama"))


@pytest.fixture
def table() -> SequenceTable:
    """Rows 0 and 2 hold prompts of 5 and 6 tokens."""
    table = SequenceTable(4, 64, BLOCK_SIZE)
    for row, length in ((0, 5), (2, 6)):
        table.token_ids[row, :length] = np.arange(length) + 10 * row
        table.num_tokens[row] = table.num_prompt_tokens[row] = length
        table.block_table[row, :4] = np.arange(4) + 4 * row
    return table


def _batch(table: SequenceTable, **counts: int) -> Batch:
    rows = [int(name[3:]) for name in counts]
    return Batch(table, np.array(rows, np.int32), np.array(list(counts.values()), np.int32))


def _request(table: SequenceTable, row: int, **sampling: Any) -> Request:
    length = int(table.num_prompt_tokens[row])
    return Request(b"", row, table.token_ids[row, :length].copy(), length, Sampling(max_tokens=5, **sampling))


def test_it_says_what_it_learned_from_the_checkpoint(files: CheckpointFiles, make_runner: Callable[..., Any]) -> None:
    runner = make_runner(files)
    facts = (runner.vocab_size, runner.max_model_len, runner.num_blocks, runner.dtype, runner.supports_prefix_caching)
    assert facts == (300, 256, 512, "float32", True)


def test_progress_is_reported_for_weights_and_warm_up(files: CheckpointFiles) -> None:
    reports: list[tuple[str, float]] = []
    config = EngineConfig(dtype="float32", block_size=BLOCK_SIZE, num_kv_blocks=8, threads_per_engine=1)
    spec = EngineSpec(engine_id=0, incarnation=0, num_engines=1, folder="", model=files, config=config)
    ModelRunner(spec, lambda stage, fraction: reports.append((stage, fraction)))
    assert ("weights", 1.0) in reports
    assert reports[-1] == ("warm-up", 1.0)


def test_only_rows_whose_tokens_are_all_computed_get_a_token(
    files: CheckpointFiles, make_runner: Callable[..., Any], table: SequenceTable
) -> None:
    runner = make_runner(files)
    for row in (0, 2):
        runner.add(row, _request(table, row))
    assert runner.execute(_batch(table, row2=4)).rows.tolist() == []
    table.num_computed_tokens[2] = 4
    result = runner.execute(_batch(table, row2=1, row0=5))
    assert result.rows.tolist() == [0]
    assert result.token_ids.dtype == np.int32
    assert result.logprobs == result.prompt_logprobs == result.errors == {}


def test_logprobs_are_given_to_rows_that_ask(
    files: CheckpointFiles, make_runner: Callable[..., Any], table: SequenceTable
) -> None:
    runner = make_runner(files)
    runner.add(0, _request(table, 0, logprobs=2))
    runner.add(2, _request(table, 2, prompt_logprobs=1))
    result = runner.execute(_batch(table, row0=5, row2=6))
    assert [len(entry.token_ids) for entry in result.logprobs.values()] == [3]
    assert list(result.prompt_logprobs) == [2]
    assert [entry.token_ids[0] for entry in result.prompt_logprobs[2]] == [21, 22, 23, 24, 25]


def test_a_row_reused_by_a_request_that_does_not_ask_gets_no_logprobs(
    files: CheckpointFiles, make_runner: Callable[..., Any], table: SequenceTable
) -> None:
    runner = make_runner(files)
    runner.add(0, _request(table, 0, logprobs=2, prompt_logprobs=2))
    runner.remove(0)
    runner.add(0, _request(table, 0))
    result = runner.execute(_batch(table, row0=5))
    assert result.logprobs == result.prompt_logprobs == {}


def test_prompt_logprobs_of_a_long_prompt_equal_those_of_its_chunks(
    make_model: Callable[..., Any], save: Callable[..., CheckpointFiles], make_runner: Callable[..., Any], drive: Any
) -> None:
    runner = make_runner(save(make_model("Llama", max_position_embeddings=512)))
    prompt = np.random.default_rng(0).integers(0, 300, 300).tolist()  # more than are computed at once
    results = []
    for chunk in (512, 64):
        driver = drive(runner, 1)
        driver.generate([prompt], 1, chunk, top=1)
        results.append([entry[0] for entry in driver.prompt_logprobs[0]])
    assert len(results[0]) == 299
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)


def test_a_row_that_cannot_be_sampled_fails_alone(
    files: CheckpointFiles, make_runner: Callable[..., Any], table: SequenceTable
) -> None:
    runner = make_runner(files)
    runner.add(0, _request(table, 0, logit_bias=((300, 1.0),)))
    runner.add(2, _request(table, 2))
    result = runner.execute(_batch(table, row0=5, row2=6))
    assert list(result.errors) == [0]
    assert result.rows.tolist() == [0, 2]


def test_the_cache_has_as_many_blocks_as_its_memory_holds(
    files: CheckpointFiles, make_runner: Callable[..., Any]
) -> None:
    runner = make_runner(files, num_kv_blocks=None, kv_cache_memory_bytes=10 * BLOCK_BYTES + 1)
    assert runner.num_blocks == 10


def test_the_cache_is_no_larger_than_its_sequences_can_use(
    files: CheckpointFiles, make_runner: Callable[..., Any]
) -> None:
    runner = make_runner(files, num_kv_blocks=None, max_num_seqs=3, max_model_len=41)
    assert runner.max_model_len == 41
    assert runner.num_blocks == 3 * 11


def test_a_fraction_of_free_memory_is_divided_over_engines(
    files: CheckpointFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        native_decoder if load_library() else torch_decoder, "available_memory", lambda: 100 * BLOCK_BYTES
    )
    config = EngineConfig(dtype="float32", block_size=BLOCK_SIZE, kv_cache_memory_fraction=0.4, threads_per_engine=1)
    spec = EngineSpec(engine_id=0, incarnation=0, num_engines=2, folder="", model=files, config=config)
    assert ModelRunner(spec).num_blocks == 20


def test_too_little_memory_for_a_block_is_refused_with_both_numbers(
    files: CheckpointFiles, make_runner: Callable[..., Any]
) -> None:
    with pytest.raises(ModelLoadError, match=rf"one KV block: 1,000 bytes .* needs {BLOCK_BYTES:,}"):
        make_runner(files, num_kv_blocks=None, kv_cache_memory_bytes=1000)


@pytest.mark.parametrize("num_blocks", [2**50, 2**60])
def test_more_blocks_than_can_be_allocated_are_refused(
    num_blocks: int, files: CheckpointFiles, make_runner: Callable[..., Any]
) -> None:
    with pytest.raises(ModelLoadError, match=r"cannot allocate .* bytes for the KV cache"):
        make_runner(files, num_kv_blocks=num_blocks)


def test_a_context_longer_than_the_models_is_refused_with_both_numbers(
    files: CheckpointFiles, make_runner: Callable[..., Any]
) -> None:
    with pytest.raises(ModelLoadError, match="max_model_len is 257, but the model's context is 256"):
        make_runner(files, max_model_len=257)


@pytest.mark.parametrize(("max_model_len", "supported"), [(64, True), (65, False)])
def test_prefixes_are_not_shared_where_keys_depend_on_the_prompts_length(
    max_model_len: int,
    supported: bool,
    make_model: Callable[..., Any],
    save: Callable[..., CheckpointFiles],
    make_runner: Callable[..., Any],
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make_model("Llama", max_position_embeddings=64, rope_parameters=rope)
    assert make_runner(save(model), max_model_len=max_model_len).supports_prefix_caching is supported


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_near_float32(
    dtype: str, files: CheckpointFiles, make_runner: Callable[..., Any], drive: Any
) -> None:
    prompt = np.random.default_rng(0).integers(0, 300, 40).tolist()
    logprobs = []
    for name in ("float32", dtype):
        runner = make_runner(files, dtype=name)
        assert runner.dtype == name
        driver = drive(runner, 1)
        driver.generate([prompt], 1, 16, top=1)
        logprobs.append(np.array([entry[0] for entry in driver.prompt_logprobs[0]]))
    assert np.abs(logprobs[0] - logprobs[1]).mean() < 0.05
    assert (logprobs[0] != logprobs[1]).any()


def test_auto_is_bfloat16_only_where_the_cpu_multiplies_it(
    files: CheckpointFiles, make_runner: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "load_library", lambda: None)
    for capabilities, expected in (({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert make_runner(files, dtype="auto").dtype == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not tell the usable CPUs")
@pytest.mark.parametrize(("num_cpus", "num_engines", "expected"), [(8, 2, 4), (8, 3, 2), (2, 4, 1)])
def test_usable_cpus_are_divided_over_engines(
    num_cpus: int,
    num_engines: int,
    expected: int,
    files: CheckpointFiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cpus)))
    config = EngineConfig(dtype="float32", block_size=BLOCK_SIZE, num_kv_blocks=8)
    spec = EngineSpec(engine_id=0, incarnation=0, num_engines=num_engines, folder="", model=files, config=config)
    assert num_threads(spec) == expected


def test_a_runner_without_a_batch_computes_for_the_others(
    make_model: Callable[..., Any], save: Callable[..., CheckpointFiles], make_runner: Callable[..., Any], drive: Any
) -> None:
    if load_library() is None:
        pytest.skip("the kernels were not built")
    files = save(make_model("Olmoe", num_experts=5, num_experts_per_tok=2, eos_token_id=None))
    prompts = np.random.default_rng(1).integers(0, 300, (3, 20)).tolist()
    expected = drive(make_runner(files), 3).generate(prompts, 10, chunk=7)
    group = GroupOfThreads(2)
    for member in group.members:
        member.joined = False  # they warm up, each when it is ready
    runners = [make_runner(files, group=member) for member in group.members]
    for member in group.members:
        member.joined = True
    others_work: list[int] = []

    def generate(member: Member) -> list[list[int]]:
        return drive(runners[0], 3).generate(prompts, 10, chunk=7)

    def help_out(member: Member) -> None:
        for _ in range(3 + 9):  # steps of the prompts, the last of which gives a token, and of the others
            runners[1].execute_dummy(lambda: others_work.append(member.engine_id))

    assert group.run_each([generate, help_out])[0] == expected
    assert others_work == [1] * 12
