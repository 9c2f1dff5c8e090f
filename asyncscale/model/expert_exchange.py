"""Rows to the engines that hold their experts, and back, where a model's experts are spread over the engines.

Imports no torch until an exchange is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class RowGroup(Protocol):
    """The engines among which rows are exchanged. joined: whether they have met; until then each is alone."""

    @property
    def engine_id(self) -> int: ...

    @property
    def num_engines(self) -> int: ...

    @property
    def joined(self) -> bool: ...

    def all_to_all(self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int]) -> None:
        """Give each engine its part of `input`, and fill `output` with what each has for this one; both contiguous, by
        engine. The splits are numbers of rows, of which some or all may be 0. Raises CollectiveError."""


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """The experts `first` to `end` of `num_experts`, which one engine holds.

    Neighbours, and as many on each engine as on any other, or one more; none where there are more engines than experts.
    """

    first: int
    end: int
    num_experts: int

    @classmethod
    def of(cls, engine_id: int, num_engines: int, num_experts: int) -> ExpertShare:
        """What this engine of so many holds."""
        return cls(engine_id * num_experts // num_engines, (engine_id + 1) * num_experts // num_engines, num_experts)

    def __len__(self) -> int:
        return self.end - self.first

    def __contains__(self, expert: int) -> bool:
        return self.first <= expert < self.end

    @property
    def experts(self) -> range:
        """Which they are."""
        return range(self.first, self.end)

    @property
    def span(self) -> slice:
        """Where they are among all experts."""
        return slice(self.first, self.end)


class ExpertExchange:
    """One engine's part in the exchange; between steps and layers nothing is kept::

        exchange = ExpertExchange(group, num_experts)
        received, counts_here = exchange.dispatch(rows, counts)
        rows_of_results = exchange.combine(multiply(received, counts_here))

    Both calls are collective: each engine of the group makes them equally often, also with no rows. While the group has
    not joined, as when an engine warms up, this engine is alone: rows of experts elsewhere come back as zeros.
    Raises CollectiveError; the next `dispatch` starts afresh.

    share: the experts of this engine.
    """

    def __init__(self, group: RowGroup, num_experts: int) -> None:
        # Imported here, as it needs torch.
        from asyncscale.model.expert_parcels import ExpertParcels

        self._group = group
        self._shares = [ExpertShare.of(i, group.num_engines, num_experts) for i in range(group.num_engines)]
        self.share = self._shares[group.engine_id]
        self._parcels = ExpertParcels(group, self._shares)
        self._way: _Way | _WayOfOne

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Have the rows computed where their experts are; get those that are to be computed here.

        rows: [R, width] of any dtype, in the order of experts. counts: int64[num_experts], how many of each, on the
        same device. Returns rows [R_local, width] in the order of this engine's experts, those of one expert in the
        order of the engines that they are from, and within that as they were there; and int64[len(share)], how many of
        each.
        """
        if not self._group.joined:
            counts_here = counts[self.share.span]
            first = int(counts[: self.share.first].sum())
            here = slice(first, first + int(counts_here.sum()))
            self._way = _WayOfOne(here, len(rows))
            return rows[here], counts_here
        numbers = counts.tolist()
        sent = [sum(numbers[share.span]) for share in self._shares]
        by_engine, of_engines = self._parcels.exchange(rows, counts, sent)
        received = [int(n) for n in of_engines.sum(1).tolist()]
        order = _transposition(of_engines)
        self._way = _Way(sent, received, order)
        return by_engine[order], of_engines.sum(0)

    def combine(self, results: Tensor) -> Tensor:
        """Give back what was made of the rows that `dispatch` returned, and get what others made of those given to it.

        results: [R_local, width], of any width and dtype. Returns [R, width], in the order of the rows given.
        """
        way = self._way
        if isinstance(way, _WayOfOne):
            back = results.new_zeros(way.num_rows, *results.shape[1:])
            back[way.here] = results
            return back
        by_engine = results.new_empty(results.shape)
        by_engine[way.order] = results
        back = results.new_empty(sum(way.sent), *results.shape[1:])
        self._group.all_to_all(back, by_engine, way.sent, way.received)
        return back


@dataclass(frozen=True, slots=True)
class _Way:
    """How rows came. sent, received: how many to and from each engine. order: of those received, by expert."""

    sent: list[int]
    received: list[int]
    order: Tensor


@dataclass(frozen=True, slots=True)
class _WayOfOne:
    """Of so many rows, those that were computed here."""

    here: slice
    num_rows: int


def _transposition(lengths: Tensor) -> Tensor:
    """Blocks of rows lie one after the other, row by row of `lengths`, int64[m, n]. Where to take rows from so that the
    blocks lie column by column; int64[lengths.sum()]."""
    starts = (lengths.view(-1).cumsum(0) - lengths.view(-1)).view_as(lengths)
    lengths, starts = lengths.t().flatten(), starts.t().flatten()
    shifts = starts - (lengths.cumsum(0) - lengths)
    order = shifts.repeat_interleave(lengths)
    return order + order.new_ones(len(order)).cumsum(0) - 1
