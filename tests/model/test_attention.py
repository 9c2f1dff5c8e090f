"""Which attention a runner uses, and that both give the same tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from asyncscale.engine.batch import Batch, SequenceTable
from asyncscale.kernels.attention import load_attention
from asyncscale.model import attention
from asyncscale.model.native_attention import NativeAttention
from asyncscale.model.torch_attention import TorchAttention

PROMPTS = [np.random.default_rng(length).integers(0, 300, length).tolist() for length in (1, 90, 37, 130)]


def test_the_kernel_is_used_where_it_was_built(
    make_model: Callable[..., Any],
    save: Callable[..., Any],
    make_runner: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = save(make_model("Llama"))
    used = make_runner(files)._decoder._attention
    assert isinstance(used, TorchAttention if load_attention() is None else NativeAttention)
    caplog.clear()
    monkeypatch.setattr(attention, "load_attention", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert isinstance(make_runner(files)._decoder._attention, TorchAttention)
    assert [record.message for record in caplog.records if "native kernels" in record.message] != []


@pytest.mark.skipif(load_attention() is None, reason="the kernel was not built")
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("threads", [1, 2])
def test_kernel_and_torch_give_the_same_tokens(
    head_dim: int,
    window: int | None,
    threads: int,
    make_model: Callable[..., Any],
    save: Callable[..., Any],
    make_runner: Callable[..., Any],
    drive: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = save(make_model("Mistral", head_dim=head_dim, sliding_window=window))
    before = torch.get_num_threads()
    tokens = [drive(make_runner(files, threads_per_engine=threads), 4).generate(PROMPTS, 20, chunk=50)]
    monkeypatch.setattr(attention, "load_attention", lambda: None)
    tokens.append(drive(make_runner(files), 4).generate(PROMPTS, 20, chunk=50))
    torch.set_num_threads(before)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("path", ["kernel", "torch"])
def test_bfloat16_scores_are_not_rounded(
    path: str,
    make_model: Callable[..., Any],
    save: Callable[..., Any],
    make_runner: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two keys whose scores differ by less than bfloat16 tells apart, but by far more than float32 does."""
    if path == "torch":
        monkeypatch.setattr(attention, "load_attention", lambda: None)
    elif load_attention() is None:
        pytest.skip("the kernel was not built")
    runner = make_runner(save(make_model("Llama", head_dim=64, num_key_value_heads=4)), dtype="bfloat16")
    cache, queries = runner._decoder._cache, torch.full((1, 4, 64), 4.0, dtype=torch.bfloat16)
    cache.data[:, 0] = 4.0
    cache.data[:, 0, :, :, 1, 0] = 4.03125  # scores 128 and 128.015625, of bfloat16's 128 and 129
    cache.data[:, 1, :, :, 0], cache.data[:, 1, :, :, 1] = 1.0, -1.0
    table = SequenceTable(1, 8, 4)
    table.num_tokens[0], table.num_computed_tokens[0] = 2, 1
    decode = Batch(table, np.zeros(1, np.int32), np.ones(1, np.int32))
    attended = runner._decoder._attention.plan(decode, None).attend(0, queries)
    expected = torch.tensor([0.0, 4.0 * 0.03125 / 8]).softmax(0) @ torch.tensor([1.0, -1.0])
    torch.testing.assert_close(attended.float(), expected.expand(1, 4, 64), rtol=2**-8, atol=1e-6)
