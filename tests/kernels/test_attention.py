"""The attention kernel against attention written down plainly, on every instruction set that this CPU has."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncscale.kernels.attention import INSTRUCTION_SETS, AttentionKernel, load_attention

# What rounding to the dtype once costs, relative to the result.
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# What float32 costs between, relative to the values.
FLOAT32 = 4e-6


@dataclass(frozen=True)
class Case:
    """Sequences of (tokens before, new tokens), their blocks scattered over a cache, gaps between their new tokens."""

    sequences: tuple[tuple[int, int], ...]
    head_dim: int = 64
    num_kv_heads: int = 2
    group: int = 3
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    tokens_together: int = 32
    sharpness: float = 1.0  # multiplies the scores
    seed: int = 0

    def make(self) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """Queries (part of a wider tensor, as the decoder's), a layer's cache (NaN where unwritten), items, blocks."""
        generator = torch.Generator().manual_seed(self.seed)
        num_blocks = [-(-(before + new) // self.block_size) for before, new in self.sequences]
        free = np.random.default_rng(self.seed).permutation(sum(num_blocks) + 1).tolist()
        table = np.zeros((len(num_blocks), max(num_blocks)), np.int32)
        cache = torch.full((2, len(free), self.num_kv_heads, self.block_size, self.head_dim), torch.nan)
        items, first = [], 0
        for row, (before, new) in enumerate(self.sequences):
            table[row, : num_blocks[row]] = [free.pop() for _ in range(num_blocks[row])]
            positions = np.arange(before + new)
            blocks, slots = table[row, positions // self.block_size], positions % self.block_size
            written = torch.randn(len(positions), 2, self.num_kv_heads, self.head_dim, generator=generator)
            cache[0][blocks, :, slots], cache[1][blocks, :, slots] = written[:, 0], written[:, 1]
            for done in range(0, new, self.tokens_together):
                items.append((first + done, min(self.tokens_together, new - done), before + done, row))
            first += new + 1
        num_heads = self.num_kv_heads * self.group
        wide = torch.randn(first, num_heads + 2, self.head_dim, generator=generator) * self.sharpness
        return wide.to(self.dtype)[:, :num_heads], cache.to(self.dtype), np.array(items, np.int64), table

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def run(self, kernel: AttentionKernel, num_threads: int) -> Tensor:
        queries, cache, items, table = self.make()
        output = torch.full(queries.shape, torch.nan, dtype=self.dtype)
        plan = kernel.plan(items, table, scale=self.scale, window=self.window, num_threads=num_threads)
        plan.run(queries, cache, output)
        return output

    def reference(self) -> Tensor:
        """float64; NaN for tokens that are in no item."""
        queries, cache, items, table = self.make()
        output = torch.full(queries.shape, torch.nan, dtype=torch.float64)
        for first, num_tokens, position, row in items.tolist():
            places = np.arange(position + num_tokens)
            blocks, slots = table[row, places // self.block_size], places % self.block_size
            keys, values = (part[blocks, :, slots].double().repeat_interleave(self.group, 1) for part in cache)
            scores = torch.einsum("qhd,khd->hqk", queries[first : first + num_tokens].double(), keys) * self.scale
            distance = torch.arange(position, position + num_tokens)[:, None] - torch.from_numpy(places)
            hidden = (distance < 0) | (distance >= (self.window or len(places) + 1))
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            output[first : first + num_tokens] = torch.einsum("hqk,khd->qhd", weights, values)
        return output

    def check(self, kernel: AttentionKernel, num_threads: int = 1) -> None:
        torch.testing.assert_close(
            self.run(kernel, num_threads).double(),
            self.reference(),
            rtol=ROUNDING[self.dtype],
            atol=FLOAT32 * max(self.sharpness, 1),
            equal_nan=True,
        )


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def kernel(request: pytest.FixtureRequest) -> AttentionKernel:
    kernel = load_attention(request.param)
    if kernel is None:
        pytest.skip(f"the kernel for {request.param} was not built, or this CPU cannot run it")
    assert kernel.isa == request.param
    return kernel


CASES = st.builds(
    Case,
    sequences=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 499), st.just(1)),
            st.tuples(st.integers(0, 300), st.integers(1, 200)),
        ),
        min_size=1,
        max_size=4,
    ).map(tuple),
    head_dim=st.sampled_from([64, 80, 96, 128, 256, 8, 16, 33, 72, 7]),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13]),
    block_size=st.sampled_from([1, 4, 5, 16, 32, 100]),
    dtype=st.sampled_from(list(ROUNDING)),
    window=st.one_of(st.none(), st.integers(1, 200)),
    tokens_together=st.sampled_from([1, 3, 32, 200]),
    sharpness=st.sampled_from([1.0, 8.0]),
    seed=st.integers(0, 100),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=CASES, num_threads=st.sampled_from([1, 3]))
def test_any_shape_is_as_the_formula_says(kernel: AttentionKernel, case: Case, num_threads: int) -> None:
    case.check(kernel, num_threads)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 33, 7])
def test_decodes_beside_a_chunk(kernel: AttentionKernel, head_dim: int, dtype: torch.dtype) -> None:
    case = Case(((0, 1), (255, 1), (63, 1), (64, 1), (100, 77)), head_dim=head_dim, dtype=dtype)
    case.check(kernel)
    replace(case, window=64).check(kernel)


def test_results_do_not_depend_on_threads_or_company(kernel: AttentionKernel) -> None:
    case = Case(((300, 1), (10, 90), (499, 1)), tokens_together=16)
    together = case.run(kernel, 1).nan_to_num(9)
    assert torch.equal(together, case.run(kernel, 3).nan_to_num(9))
    queries, cache, items, table = case.make()
    for row in range(3):
        alone = torch.full_like(together, 9)
        own = items[items[:, 3] == row]
        kernel.plan(own, table, scale=case.scale).run(queries, cache, alone)
        named = slice(own[0, 0], own[-1, 0] + own[-1, 1])
        assert torch.equal(alone[named], together[named])


def test_large_scores_neither_overflow_nor_lose_the_winner(kernel: AttentionKernel) -> None:
    case = Case(((200, 1), (40, 40)), dtype=torch.float32, sharpness=1000.0)
    output = case.run(kernel, 1)
    torch.testing.assert_close(output.double(), case.reference(), rtol=1e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("new", [(130, 1), (100, 31)])
def test_nan_in_a_seen_key_reaches_the_output_and_no_other_sequence(
    kernel: AttentionKernel, new: tuple[int, int], dtype: torch.dtype
) -> None:
    case = Case((new, (60, 1)), num_kv_heads=1, group=1, dtype=dtype)
    queries, cache, items, table = case.make()
    cache[0, table[0, 3], 0, 5, 1] = torch.nan
    output = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    kernel.plan(items, table, scale=case.scale).run(queries, cache, output)
    assert output[: new[1]].isnan().all()
    assert not output[new[1] :].isnan().any()


def test_a_value_that_is_not_seen_yet_weighs_nothing(kernel: AttentionKernel) -> None:
    case = Case(((0, 40),), num_kv_heads=1, group=1, dtype=torch.float32, tokens_together=40)
    queries, cache, items, table = case.make()
    outputs = []
    for last_value in (1.0, 1e38):
        cache[1, table[0, 2], 0, 7] = last_value
        outputs.append(torch.zeros_like(queries, memory_format=torch.contiguous_format))
        kernel.plan(items, table, scale=case.scale).run(queries, cache, outputs[-1])
    assert torch.equal(outputs[0][:39], outputs[1][:39])
    assert (outputs[1][39] > 1e30).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_half_way_between_two_values_are_rounded_to_even(kernel: AttentionKernel, dtype: torch.dtype) -> None:
    case = Case(((1, 1),), num_kv_heads=1, group=1, dtype=dtype)
    queries, cache, items, table = case.make()
    queries.zero_()
    values = 1 + torch.arange(64) * torch.finfo(dtype).eps
    cache[1, table[0, 0], 0, :2] = torch.stack((values, values + torch.finfo(dtype).eps)).to(dtype)
    output = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    kernel.plan(items, table, scale=case.scale).run(queries, cache, output)
    assert torch.equal(output[0, 0], cache[1, table[0, 0], 0, :2].float().mean(0).to(dtype))


def test_infinite_and_subnormal_float16_values_are_kept(kernel: AttentionKernel) -> None:
    case = Case(((0, 1),), dtype=torch.float16, num_kv_heads=1, group=1, head_dim=64)
    queries, cache, items, table = case.make()
    values = torch.tensor([6e-8, -6e-8, 5.9e-5, 65504.0, -65504.0, torch.inf, -torch.inf, 0.0] * 8, dtype=torch.float16)
    cache[1, table[0, 0], 0, 0] = values
    output = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    kernel.plan(items, table, scale=case.scale).run(queries, cache, output)
    assert torch.equal(output[0, 0], values)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda q, c, o: (q.double(), c.double(), o.double()), TypeError),
        (lambda q, c, o: (q.float(), c, o), TypeError),
        (lambda q, c, o: (q[..., :32], c, o[..., :32]), ValueError),
        (lambda q, c, o: (q[:, :5], c, o[:, :5]), ValueError),
        (lambda q, c, o: (q, c, o[:-1]), ValueError),
        (lambda q, c, o: (q.transpose(0, 1).contiguous().transpose(0, 1), c, o), ValueError),
        (lambda q, c, o: (q, c.transpose(2, 3).contiguous().transpose(2, 3), o), ValueError),
    ],
)
def test_tensors_that_the_kernel_cannot_read_are_refused(change: object, error: type[Exception]) -> None:
    kernel = load_attention()
    if kernel is None:
        pytest.skip("the kernel was not built")
    case = Case(((5, 2),))
    queries, cache, items, table = case.make()
    output = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    with pytest.raises(error):
        kernel.plan(items, table, scale=case.scale).run(*change(queries, cache, output))  # type: ignore[operator]
