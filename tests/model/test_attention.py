"""Attention in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from asyncscale.engine.batch import Batch, SequenceTable
from asyncscale.model import decoder


def test_bfloat16_scores_are_not_rounded(
    make_model: Callable[..., Any],
    save: Callable[..., Any],
    make_runner: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two keys whose scores differ by less than bfloat16 tells apart, but by far more than float32 does."""
    monkeypatch.setattr(decoder, "load_library", lambda: None)
    runner = make_runner(save(make_model("Llama", head_dim=64, num_key_value_heads=4)), dtype="bfloat16")
    cache, queries = runner.decoder._cache, torch.full((1, 4, 64), 4.0, dtype=torch.bfloat16)
    cache.data[:, 0] = 4.0
    cache.data[:, 0, :, :, 1, 0] = 4.03125  # scores 128 and 128.015625, of bfloat16's 128 and 129
    cache.data[:, 1, :, :, 0], cache.data[:, 1, :, :, 1] = 1.0, -1.0
    table = SequenceTable(1, 8, 4)
    table.num_tokens[0], table.num_computed_tokens[0] = 2, 1
    decode = Batch(table, np.zeros(1, np.int32), np.ones(1, np.int32))
    attended = runner.decoder._attention.plan(decode, None).attend(0, queries)
    expected = torch.tensor([0.0, 4.0 * 0.03125 / 8]).softmax(0) @ torch.tensor([1.0, -1.0])
    torch.testing.assert_close(attended.float(), expected.expand(1, 4, 64), rtol=2**-8, atol=1e-6)
