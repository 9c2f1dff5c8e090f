"""What a smaller type costs in quality: the measures, and on a tiny model of random weights."""

from __future__ import annotations

import numpy as np
import pytest

from asyncscale.bench.local_model import LocalModel
from asyncscale.bench.quality import log_softmax, measure, num_equal, table
from asyncscale.config import CheckpointFiles


def test_equal_tokens_are_counted_up_to_the_first_that_differs() -> None:
    assert num_equal([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert num_equal([1, 2], [1, 2]) == 2
    assert num_equal([5], [6]) == 0


def test_log_softmax_is_of_each_row() -> None:
    values = log_softmax(np.array([[0, np.log(3)], [1000, 1000]], np.float32))
    np.testing.assert_allclose(np.exp(values), [[0.25, 0.75], [0.5, 0.5]], atol=1e-6)


@pytest.fixture
def models(tiny_files: CheckpointFiles) -> dict[str, LocalModel]:
    return {
        "float32": LocalModel(tiny_files, "float32", None, 1),
        "bfloat16": LocalModel(tiny_files, "bfloat16", None, 1),
        "int8": LocalModel(tiny_files, "bfloat16", "int8", 1),
    }


def test_logits_are_the_same_in_any_chunks(models: dict[str, LocalModel]) -> None:
    token_ids = np.arange(100, dtype=np.int32)
    model = models["float32"]
    whole = np.concatenate([logits.copy() for logits in model.logits(token_ids, 100)])
    parts = np.concatenate([logits.copy() for logits in model.logits(token_ids, 33)])
    assert whole.shape == (100, 300)
    assert np.array_equal(whole, parts)
    [text] = model.greedy([token_ids], 3)
    assert text[0] == whole[-1].argmax()


def test_quality_of_each_type_is_measured_beside_the_others(models: dict[str, LocalModel]) -> None:
    rng = np.random.default_rng(0)
    windows = [rng.integers(300, size=size, dtype=np.int32) for size in (200, 130)]
    quality = measure(models, windows, [window[:20] for window in windows], 12)
    assert quality.num_tokens == 328
    assert all(len(surprises) == 328 for surprises in quality.surprises.values())
    exact = log_softmax(np.concatenate([logits.copy() for logits in models["float32"].logits(windows[0], 200)]))
    assert quality.surprises["float32"][:199] == pytest.approx((-exact[np.arange(199), windows[0][1:]]).tolist())
    bfloat16, int8 = quality.differences["bfloat16", "float32"], quality.differences["int8", "float32"]
    assert len(int8.divergences) == len(int8.same_first) == 330
    assert 0 < np.mean(bfloat16.divergences) < np.mean(int8.divergences) < 1
    assert np.mean(bfloat16.same_first) > 0.9
    assert len(int8.num_equal) == 2
    header, _, *rows = table(quality, 12).splitlines()
    assert "of 12" in header
    assert [[cell.strip() for cell in row.split("|")[1:4:2]] for row in rows] == [
        ["float32", ""], ["bfloat16", "float32"], ["int8", "float32"], ["int8", "bfloat16"],
    ]  # fmt: skip
