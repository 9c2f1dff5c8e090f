"""Rows reach the engines that hold their experts, and their results come back in order, whatever the counts."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from group_of_threads import GroupOfThreads, Member
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asyncscale.model import expert_parcels
from asyncscale.model.expert_exchange import ExpertExchange, ExpertShare
from asyncscale.tandem.collective_errors import CollectiveError


@given(num_engines=st.integers(1, 9), num_experts=st.integers(1, 200))
def test_shares_are_neighbours_and_as_equal_as_can_be(num_engines: int, num_experts: int) -> None:
    shares = [ExpertShare.of(i, num_engines, num_experts) for i in range(num_engines)]
    assert [expert for share in shares for expert in range(share.first, share.end)] == list(range(num_experts))
    assert [sum(expert in share for share in shares) for expert in range(num_experts)] == [1] * num_experts
    sizes = {len(share) for share in shares}
    assert max(sizes) - min(sizes) <= 1


@st.composite
def counts_of_engines(draw: st.DrawFn) -> list[list[int]]:
    """How many rows each engine has for each expert."""
    num_experts = draw(st.integers(1, 6))
    counts = st.one_of(st.just(0), st.integers(0, 5))
    return draw(st.lists(st.lists(counts, min_size=num_experts, max_size=num_experts), min_size=1, max_size=4))


def named_rows(engine_id: int, counts: list[int]) -> Tensor:
    """Each says where it is from, of which expert, and which of those it is."""
    rows = [[engine_id, expert, i] for expert, count in enumerate(counts) for i in range(count)]
    return torch.tensor(rows, dtype=torch.int32).view(-1, 3)


@pytest.mark.parametrize("room", [1, 40, None], ids=["parcels of a row", "of some rows", "of all rows"])
@given(data=st.data())
def test_rows_reach_their_experts_and_results_come_back_in_order(room: int | None, data: st.DataObject) -> None:
    """room: bytes in each parcel."""
    counts = data.draw(counts_of_engines())
    num_experts = len(counts[0])

    def exchange(member: Member) -> tuple[list[list[int]], list[int], Tensor]:
        exchange = ExpertExchange(member, num_experts)
        mine = counts[member.engine_id]
        rows, counts_here = exchange.dispatch(named_rows(member.engine_id, mine), torch.tensor(mine))
        back = exchange.combine(torch.cat([rows, rows[:, :1] * 10 + rows[:, 1:2]], 1).double())
        return rows.tolist(), counts_here.tolist(), back

    with patch.object(expert_parcels, "_ROOM_BYTES", room or 32768):
        results = GroupOfThreads(len(counts)).run(exchange)
    for member_id, (rows, counts_here, back) in enumerate(results):
        share = ExpertShare.of(member_id, len(counts), num_experts)
        assert rows == [
            [source, expert, i]
            for expert in range(share.first, share.end)
            for source in range(len(counts))
            for i in range(counts[source][expert])
        ]
        assert counts_here == [sum(of_engine[e] for of_engine in counts) for e in range(share.first, share.end)]
        sent = named_rows(member_id, counts[member_id])
        assert back.dtype == torch.float64
        assert back.tolist() == torch.cat([sent, sent[:, :1] * 10 + sent[:, 1:2]], 1).tolist()


def test_few_rows_take_one_exchange_each_way_and_one_that_has_many_makes_it_one_more_for_all() -> None:
    def exchange(member: Member) -> list[int]:
        exchange = ExpertExchange(member, 3)
        made = []
        for counts in ([1, 0, 2], [0, 3000, 0] if member.engine_id == 1 else [0, 0, 0], [0, 0, 0]):
            before = member.num_exchanges
            rows, _ = exchange.dispatch(named_rows(member.engine_id, counts), torch.tensor(counts))
            assert torch.equal(exchange.combine(rows), named_rows(member.engine_id, counts))
            made.append(member.num_exchanges - before)
        return made

    assert GroupOfThreads(3).run(exchange) == [[2, 3, 2]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8])
def test_rows_may_be_of_any_dtype(dtype: torch.dtype) -> None:
    def exchange(member: Member) -> Tensor:
        exchange = ExpertExchange(member, 4)
        rows, _ = exchange.dispatch(torch.arange(8).view(4, 2).to(dtype), torch.ones(4, dtype=torch.int64))
        assert rows.dtype == dtype
        return exchange.combine(rows)

    for back in GroupOfThreads(2).run(exchange):
        assert back.dtype == dtype
        assert back.tolist() == torch.arange(8).view(4, 2).tolist()


@pytest.mark.parametrize(("engine_id", "expected"), [(0, [0, 0, 0, 4, 5]), (1, [1, 2, 3, 0, 0])])
def test_before_the_group_has_joined_an_engine_computes_its_own_experts_alone(
    engine_id: int, expected: list[int]
) -> None:
    member = GroupOfThreads(2).members[engine_id]
    member.joined = False
    exchange = ExpertExchange(member, 4)
    rows, counts = exchange.dispatch(torch.tensor([[1], [2], [3], [4], [5]]), torch.tensor([1, 2, 0, 2]))
    assert counts.tolist() == ([1, 2], [0, 2])[engine_id]
    back = exchange.combine(rows)
    alone = [[1, 2, 3, 0, 0], [0, 0, 0, 4, 5]][engine_id]
    assert back.flatten().tolist() == alone


def test_an_engine_without_experts_is_alone_with_no_rows() -> None:
    member = GroupOfThreads(3).members[0]
    member.joined = False
    exchange = ExpertExchange(member, 2)
    rows, counts = exchange.dispatch(torch.ones(3, 2), torch.tensor([1, 2]))
    assert (rows.shape, counts.tolist()) == ((0, 2), [])
    assert exchange.combine(rows).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("number", [0, 1])
def test_after_a_failure_the_next_exchange_starts_afresh(number: int) -> None:
    group = GroupOfThreads(2)
    exchanges = [ExpertExchange(member, 2) for member in group.members]

    def exchange(member: Member) -> list[list[int]]:
        exchange = exchanges[member.engine_id]
        rows, _ = exchange.dispatch(named_rows(member.engine_id, [2, 1]), torch.tensor([2, 1]))
        return exchange.combine(rows).tolist()

    def fail(at: int) -> None:
        if at == number:
            raise CollectiveError("gone")

    group.members[1].before_exchange = fail
    with pytest.raises(CollectiveError):
        group.run(exchange)
    assert group.run(exchange) == [named_rows(i, [2, 1]).tolist() for i in range(2)]
