"""Threads, and what they count."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from group_of_threads import GroupOfThreads
from tiny_models import ISAS, Model, random_weights, tiny

from asyncscale.kernels.library import PHASES, load_library
from asyncscale.progress import Progress, look, make_file

MakeModel = Callable[..., Model]

TASKS = Path("/proc/self/task")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_step_counts_its_ticks_and_where_its_time_went(
    threads: int, isa: str, make_model: MakeModel, tmp_path: Path
) -> None:
    # Every other layer has experts.
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "decoder_sparse_step": 2}
    config = tiny(architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=7, **sizes)
    [member] = GroupOfThreads(1).members  # so that rows are exchanged, with itself
    model = make_model(isa, config, random_weights(config), threads=threads, group=member)
    path = str(tmp_path / "progress")
    make_file(path)
    model.decoder.progress = Progress(path)
    model.start(0, list(range(40)), [9, 3, 5])
    ticks = []
    for count in (30, 1, 1):
        model.step({0: count})
        sight = look(path)
        assert sight is not None
        ticks.append(sight.ticks)
    steps = np.diff(ticks, prepend=0)
    assert steps.min() == steps.max() >= config.num_layers
    durations = dict(zip(PHASES, model.decoder.durations.tolist(), strict=True))
    assert all(durations.values()), durations
    model.step({0: 1})
    assert (model.decoder.durations > list(durations.values())).all()


@pytest.mark.skipif(not TASKS.exists(), reason="needs Linux' list of threads")
@pytest.mark.skipif(not ISAS, reason="the kernels were not built")
def test_teams_take_their_threads_with_them() -> None:
    library = load_library()
    assert library is not None
    before = len(os.listdir(TASKS))
    team = library.cdll.asyncscale_team_new(5)
    assert library.cdll.asyncscale_team_size(team) == 5
    assert len(os.listdir(TASKS)) == before + 4
    library.cdll.asyncscale_team_delete(team)
    for size in (1, 2, 5) * 50:
        library.cdll.asyncscale_team_delete(library.cdll.asyncscale_team_new(size))
    # The system may list the very last ones for another moment.
    assert len(os.listdir(TASKS)) < before + 10
