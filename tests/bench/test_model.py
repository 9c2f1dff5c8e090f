"""The parts of a step: what there is to do, what was measured, and the table of both."""

from __future__ import annotations

import re

import numpy as np
import pytest

from asyncscale.bench.__main__ import main
from asyncscale.bench.model_engine import PARTS, PYTHON_PARTS, MeasuredStep, measured_engine
from asyncscale.bench.model_report import Measured, Workload, summarize, table
from asyncscale.bench.model_work import StepWork, Work, total_work
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles, EngineConfig, SimulatedModel
from asyncscale.kernels.limits import Limits
from asyncscale.params import Sampling
from asyncscale.tokenization.simulated import SimulatedTokenizer

LIMITS = Limits(1, bytes_per_s=1e9, operations_per_s={"float32": 1e9, "bfloat16": 2e9, "int8": 4e9})


def step(seconds: float, num_decodes: int = 1, **parts: float) -> MeasuredStep:
    return MeasuredStep(
        np.array([9], np.int32), np.array([1], np.int32), num_decodes, 1, dict.fromkeys(PARTS, seconds) | parts
    )


# --- what there is to do


def test_work_is_counted_from_the_models_shapes(tiny_files: CheckpointFiles) -> None:
    work = StepWork(ModelConfig.load(tiny_files), "float32", "bfloat16")
    works = work.of(np.array([9, 0]), np.array([1, 3]), 2)
    assert works["qkv"] == Work(2 * 4 * 2 * 64 * 128, 2 * 4 * 64 * 128, "float32")
    assert works["output"] == Work(2 * 4 * 2 * 64 * 64, 2 * 4 * 64 * 64, "float32")
    assert works["gate_up"] == Work(2 * 4 * 2 * 64 * 192, 2 * 4 * 64 * 192, "float32")
    assert works["down"] == Work(2 * 4 * 2 * 64 * 96, 2 * 4 * 64 * 96, "float32")
    # 300 outputs are padded to 304
    assert works["head"] == Work(2 * 2 * 64 * 300, 4 * 64 * 304, "float32")
    # scores and sums of four heads of 16, in two layers: one token that sees 10, and three that see 1, 2 and 3
    assert works["attention"] == Work(2 * 2 * 2 * 64 * (10 + 6), 2 * 2 * 2 * 32 * (10 + 3), "bfloat16")
    assert work.weight_bytes == sum(works[name].num_bytes for name in works if name != "attention")


def test_int8_weights_are_read_with_their_scales(tiny_files: CheckpointFiles) -> None:
    work = StepWork(ModelConfig.load(tiny_files), "int8", "bfloat16").of(np.array([0]), np.array([1]), 1)
    assert work["qkv"].format == "int8"
    assert work["qkv"].num_bytes == 2 * (64 * 128 + 4 * 128)


def test_a_step_that_samples_nothing_reads_no_head(tiny_files: CheckpointFiles) -> None:
    work = StepWork(ModelConfig.load(tiny_files), "float32", "float32").of(np.array([0]), np.array([5]), 0)
    assert (work["head"].operations, work["head"].num_bytes) == (0, 0)


def test_experts_are_read_by_as_many_tokens_as_choose_them() -> None:
    config = {"architectures": ["OlmoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 300}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ModelConfig.parse(config | sizes | {"max_position_embeddings": 512}, "test")
    work = StepWork(model, "bfloat16", "bfloat16")
    works = work.of(np.array([9]), np.array([1]), 1)
    assert works["router"] == Work(2 * 2 * 64 * 8, 4 * 2 * 64 * 16, "float32")  # 8 outputs are padded to 16
    assert works["experts_gate_up"] == Work(2 * 2 * 2 * 64 * 192, 2 * 2 * 2 * 64 * 192, "bfloat16")
    assert works["experts_down"] == Work(2 * 2 * 2 * 64 * 96, 2 * 2 * 2 * 64 * 96, "bfloat16")
    assert work.weight_bytes == sum(works[name].num_bytes for name in works if name != "attention")
    assert "gate_up" not in works
    two = work.of(np.array([9]), np.array([2]), 1)["experts_down"]
    assert two.operations == 2 * works["experts_down"].operations
    assert two.num_bytes == 2 * 2 * 8 * 64 * 96 * (1 - 0.75**2)


def test_a_window_bounds_what_attention_sees(tiny_files: CheckpointFiles) -> None:
    model = ModelConfig.load(tiny_files)
    windowed = replace_windows(model, (4, None))
    work = StepWork(windowed, "float32", "float32").of(np.array([9]), np.array([2]), 1)["attention"]
    assert work.operations == 4 * 64 * ((4 + 4) + (10 + 11))
    assert work.num_bytes == 2 * 32 * 4 * ((4 + 1) + 11)


def replace_windows(model: ModelConfig, windows: tuple[int | None, ...]) -> ModelConfig:
    class Windowed:
        layer_windows = windows

        def __getattr__(self, name: str) -> object:
            return getattr(model, name)

    return Windowed()  # type: ignore[return-value]


def test_the_slower_of_arithmetic_and_memory_is_the_limit() -> None:
    assert Work(6e9, 1e9, "bfloat16").least_seconds(LIMITS) == 3
    assert Work(6e9, 5e9, "bfloat16").least_seconds(LIMITS) == 5
    assert total_work([{"a": Work(1, 2, "int8")}, {"a": Work(3, 4, "int8")}])["a"] == Work(4, 6, "int8")


# --- what was measured


def test_parts_of_each_step_of_an_engine_are_measured(tiny_files: CheckpointFiles) -> None:
    config = EngineConfig(
        dtype="float32",
        threads_per_engine=1,
        enable_prefix_caching=False,
        max_num_batched_tokens=64,
        speculation="off",
    )
    prompts = [np.arange(50, dtype=np.int32) + i for i in range(3)]
    with measured_engine(tiny_files, config) as engine:
        for _ in range(2):
            steps = engine.run(prompts, Sampling(max_tokens=6))
            num_tokens = sum(int(step.counts.sum()) for step in steps)
            assert 3 * (50 + 5) - 3 <= num_tokens < 3 * (50 + 5)  # the last step, of up to three, is not there
            for one in steps:
                assert one.seconds.keys() == set(PARTS)
                assert min(one.seconds.values()) > -1e-9, one.seconds
                assert one.seconds["head"] > 0 or one.num_logits == 0
                assert min(one.seconds[part] for part in ("qkv", "attention", "down", *PYTHON_PARTS[1:])) > 0
            assert any(one.num_decodes == 3 == one.num_logits for one in steps)


def test_the_middle_half_of_steps_is_averaged(tiny_files: CheckpointFiles) -> None:
    work = StepWork(ModelConfig.load(tiny_files), "float32", "float32")
    runs = [[step(seconds)] for seconds in (1.0, 100.0, 2.0, 4.0, 3.0, 0.0, 5.0, 6.0)]
    measured = summarize(Workload("decode", 1, 9, 1, Sampling(9)), runs, work)
    assert measured.seconds == dict.fromkeys(PARTS, 3.5)
    assert measured.works == work.of(np.array([9]), np.array([1]), 1)
    assert measured.python_s == 3.5 * len(PYTHON_PARTS)


def test_chunks_of_a_prompt_are_added_up(tiny_files: CheckpointFiles) -> None:
    work = StepWork(ModelConfig.load(tiny_files), "float32", "float32")
    measured = summarize(Workload("prefill", 1, 9, 0, Sampling(9)), [[step(1.0, 0), step(2.0, 0)]], work)
    assert measured.seconds == dict.fromkeys(PARTS, 3.0)
    assert measured.num_tokens == 2
    assert measured.works["qkv"] == Work(2 * 2 * 2 * 64 * 128, 2 * 2 * 4 * 64 * 128, "float32")


def test_steps_that_were_not_seen_are_an_error(tiny_files: CheckpointFiles) -> None:
    work = StepWork(ModelConfig.load(tiny_files), "float32", "float32")
    with pytest.raises(ValueError, match="no step of 'decode, batch 7'"):
        summarize(Workload("decode, batch 7", 7, 9, 7, Sampling(9)), [], work)


# --- the table


def test_a_part_is_shown_beside_its_limits() -> None:
    seconds = dict.fromkeys(PARTS, 0.0) | {"qkv": 0.002, "norms": 0.006}
    measured = Measured(Workload("decode", 1, 9, 1, Sampling(9)), 1, 9.0, seconds, {"qkv": Work(1e6, 1.5e6, "float32")})
    lines = table(measured, LIMITS).splitlines()
    assert "| linear: qkv | 2.000 | 25 % | 0 | 50 % | 0.8 | 75 % | 75 % |" in lines
    assert "| norms | 6.000 | 75 % |  |  |  |  |  |" in lines
    assert lines[-1].startswith("| all | 8.000 | 100 % |")
    assert len({line.count("|") for line in lines}) == 1


def test_parts_of_experts_are_shown_where_there_are_any() -> None:
    seconds = dict.fromkeys(PARTS, 0.001)
    plain = Measured(Workload("decode", 1, 9, 1, Sampling(9)), 1, 9.0, seconds, {"qkv": Work(1, 1, "float32")})
    assert "experts" not in table(plain, LIMITS)
    works = {"router": Work(1e6, 1e6, "float32"), "experts_down": Work(1e6, 0.5e6, "float32")}
    lines = table(Measured(plain.workload, 1, 9.0, seconds, works), LIMITS).splitlines()
    assert sum(line.startswith("| experts: ") for line in lines) == 5
    assert any(line.startswith("| experts: down | 1.000 |") and line.endswith("| 100 % |") for line in lines)


def test_the_command_prints_a_table_for_each_workload(
    tiny_files: CheckpointFiles, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncscale.bench.model.resolve_model", lambda name: tiny_files)
    monkeypatch.setattr("asyncscale.bench.model.load_codec", lambda files: SimulatedTokenizer(SimulatedModel()))
    monkeypatch.setattr("asyncscale.bench.model.measure_limits", lambda library, num_threads, formats: LIMITS)
    options = ["--dtype", "float32", "--threads", "1", "--batches", "1,3", "--context", "40", "--prompt", "100"]
    assert main(["model", "--model", tiny_files.path, *options, "--steps", "8", "--long-context", "150"]) == 0
    output = capsys.readouterr().out
    titles = re.findall(r"^\*\*(.+): [\d.,]+ ms, [\d,]+ tokens/s\*\*$", output, re.MULTILINE)
    names = [re.sub(r", \d+ tokens of context", "", title) for title in titles]
    assert names == ["prefill of 100 tokens", "decode, batch 1", "decode, batch 3", "decode, batch 1"]
    assert output.count("| all |") == 4
    assert "Limit of one token's decode" in output
