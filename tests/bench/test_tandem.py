"""What `tandem` measures, a little of it; and the checkpoint that it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncscale.bench import tandem_experts, tandem_waves
from asyncscale.bench.random_experts import ExpertSizes, write_checkpoint
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.checkpoint.resolve import resolve_model
from asyncscale.kernels.library import load_library
from asyncscale.tokenization.loading import load_codec


def test_a_random_checkpoint_has_the_experts_that_were_asked_for(tmp_path: Path) -> None:
    sizes = ExpertSizes(hidden=128, num_layers=2, num_experts=6, per_token=3, inner=64, vocabulary=300)
    write_checkpoint(tmp_path / "experts", sizes)
    files = resolve_model(str(tmp_path / "experts"))
    experts = ModelConfig.load(files).experts
    assert experts is not None
    assert (experts.num_experts, experts.num_experts_per_token, experts.intermediate_size) == (6, 3, 64)
    assert experts.layers == (True, True)
    assert load_codec(files).encode("w299") == [299]
    weights = (tmp_path / "experts" / "model.safetensors").stat().st_size
    assert 2 * sizes.num_expert_weights < weights < 2 * sizes.num_expert_weights + 1_000_000


async def test_a_quick_run_measures_every_line_up() -> None:
    if load_library() is None:
        pytest.skip("the kernels were not built")
    rows = await tandem_experts.measure(tandem_experts.QUICK)
    rates = {(row.section, row.what): row.figures for row in rows if "tokens_per_s" in row.figures}
    assert len(rates) == 2 * 5
    assert all((figures["tokens_per_s"] or 0) > 0 for figures in rates.values())
    assert rates["8 at once", "1 engine"]["ratio"] == 1
    spread = rates["8 at once", "2 engines in tandem"]["dummies"] or 0
    at_one = rates["8 at once", "2 engines in tandem, all requests at one"]["dummies"] or 0
    assert spread < 0.5 <= at_one  # the other engine has nothing but those
    others = {row.section: row.figures for row in rows if "tokens_per_s" not in row.figures}
    assert others.keys() == {"alone, after a pause", "idle"}


async def test_waves_are_measured_beside_engines_on_their_own() -> None:
    rows = await tandem_waves.measure(tandem_waves.QUICK)
    assert [row.what for row in rows] == 2 * ["2 engines on their own", "2 engines in tandem"]
    assert all((value or 0) > 0 for row in rows for value in row.figures.values())
