"""New weights in an engine core: what is computed anew, what is shared, what clients are told."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest

from asyncscale.config import SimulatedModel
from asyncscale.engine.weight_updates import WeightUpdates
from asyncscale.errors import ModelLoadError

PROMPT = list(range(64))


@pytest.mark.parametrize("recompute", [True, False])
def test_requests_go_on_and_share_nothing_with_what_was_before(make_engine, run_solo, endless, recompute):
    engine = make_engine()
    engine.add(0, PROMPT, max_tokens=50, **endless)
    engine.add(1, PROMPT, max_tokens=50, **endless)
    for _ in range(20):
        engine.step()
    num_batches = len(engine.runner.batches)
    engine.core.weights_changed(1, recompute=recompute)
    engine.core.check_integrity()
    assert engine.core.kv_cache_stats()["cached_blocks"] == 0
    engine.run()
    computed = sum(count for batch in engine.runner.batches[num_batches:] for _, count in batch)
    assert (computed > 2 * len(PROMPT)) == recompute
    expected = run_solo(PROMPT, max_tokens=50, **endless)[0]
    assert engine.tokens(0) == engine.tokens(1) == expected
    # What went on with keys and values of before is in the cache of nobody.
    assert (engine.core.kv_cache_stats()["cached_blocks"] > 0) == recompute
    engine.core.check_integrity()


def test_outputs_say_of_which_weights_they_are(make_engine, endless):
    core = make_engine().core
    from asyncscale.messages import Add
    from asyncscale.params import Sampling

    core.add(b"c", Add(0, b"\1\0\0\0", 1, Sampling(max_tokens=9)))
    assert core.step()[b"c"].weight_version == 0
    core.weights_changed(1, recompute=True)
    outputs = core.step()[b"c"]
    assert outputs.weight_version == 1
    assert outputs.preempted == []


class _Runner:
    """Loads when it is told to."""

    def __init__(self) -> None:
        self.may_load = threading.Event()
        self.error: Exception | None = None
        self.used: list[Any] = []

    def load_weights(self, model: Any, progress: Any) -> Any:
        progress(0.5)
        self.may_load.wait(10)
        if self.error is not None:
            raise self.error
        return "weights"

    def use_weights(self, weights: Any) -> None:
        self.used.append(weights)

    def weights_changed(self, version: int, *, recompute: bool) -> None:
        self.used.append((version, recompute))


def test_weights_are_loaded_meanwhile_and_used_when_the_owner_says_so():
    runner = _Runner()
    updates = WeightUpdates(runner, runner)
    model = msgspec.to_builtins(SimulatedModel())
    updates.prepare_weights(1, model)
    with pytest.raises(ValueError, match="version 1 are not loaded"):
        updates.use_weights(1, True)
    with pytest.raises(ValueError, match="not told of the weights of version 2"):
        updates.use_weights(2, True)
    assert not updates.prepared_weights(1).done
    runner.may_load.set()
    while not updates.prepared_weights(1).done:
        pass
    updates.use_weights(1, True)
    assert runner.used == ["weights", (1, True)]
    with pytest.raises(ValueError, match="not told of the weights of version 1"):
        updates.use_weights(1, True)


@pytest.mark.parametrize(
    ("error", "text"), [(ModelLoadError("too large"), "too large"), (MemoryError("none"), "MemoryError: none")]
)
def test_what_goes_wrong_is_told_and_changes_nothing(error, text):
    runner = _Runner()
    runner.error = error
    runner.may_load.set()
    updates = WeightUpdates(runner, runner)
    updates.prepare_weights(1, msgspec.to_builtins(SimulatedModel()))
    while not updates.prepared_weights(1).done:
        pass
    assert updates.prepared_weights(1).error == text
    with pytest.raises(ValueError, match="version 1 are not loaded"):
        updates.use_weights(1, True)
    updates.drop_weights(1)
    assert runner.used == []
