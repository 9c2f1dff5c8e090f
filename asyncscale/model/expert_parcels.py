"""How engines give each other rows and say how many: in one all-to-all where these are few, in two where they are many.

Each engine gives each a parcel, all of one size: whether it has more for anyone than parcels hold; how many rows there
are for each expert; and the first rows. All see all of the first, so all know whether to meet again for the rest. An
all-to-all takes some tenths of a millisecond however little is in it, as long as the products of a small step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from asyncscale.model.expert_exchange import ExpertShare, RowGroup

# For rows, in each parcel: what is moved in a small part of the time that an all-to-all takes anyway.
_ROOM_BYTES = 32 << 10
_NUMBER_BYTES = 8


class ExpertParcels:
    """::

        parcels = ExpertParcels(group, shares)
        received, counts_of_engines = parcels.exchange(rows, counts, lengths)

    shares: of the experts, of all engines of the group.
    """

    def __init__(self, group: RowGroup, shares: list[ExpertShare]) -> None:
        self._group = group
        self._shares = shares
        self._head_size = 1 + max(len(share) for share in shares)

    def exchange(self, rows: Tensor, counts: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """rows: [R, width], in the order of experts. counts: int64[num_experts], how many of each. lengths: how many
        are for each engine.

        Returns the rows of all engines for this one, in the order of engines; and int64[num_engines, experts here], how
        many each has for each. Raises CollectiveError.
        """
        width = rows.shape[1] * rows.element_size()
        room = max(_ROOM_BYTES // width, 1)  # rows
        parts = torch.split(rows.contiguous().view(torch.uint8), lengths)
        sent = self._parcels(counts.device, room * width)
        has_more = any(len(part) > room for part in parts)
        for parcel, share, part in zip(sent, self._shares, parts, strict=True):
            numbers = self._head(parcel)
            numbers[0] = has_more
            numbers[1 : 1 + len(share)] = counts[share.span]
            self._rows(parcel, min(len(part), room), width).copy_(part[:room])
        received = torch.empty_like(sent)
        one_each = [1] * len(parts)
        self._group.all_to_all(received, sent, one_each, one_each)
        heads = self._head(received)
        counts_of_engines = heads[:, 1 : 1 + len(self._shares[self._group.engine_id])]
        coming = counts_of_engines.sum(1).tolist()
        arrived = [self._rows(parcel, min(n, room), width) for parcel, n in zip(received, coming, strict=True)]
        if heads[:, 0].any():
            rest = self._exchange_rest([part[room:] for part in parts], [max(n - room, 0) for n in coming])
            arrived = [part for both in zip(arrived, rest, strict=True) for part in both]
        return torch.cat(arrived).view(rows.dtype), counts_of_engines.contiguous()

    def _exchange_rest(self, parts: list[Tensor], lengths: list[int]) -> list[Tensor]:
        """What parcels did not hold. lengths: of what comes from each engine."""
        sent = torch.cat(parts)
        received = sent.new_empty(sum(lengths), sent.shape[1])
        self._group.all_to_all(received, sent, lengths, [len(part) for part in parts])
        return list(torch.split(received, lengths))

    def _parcels(self, device: torch.device, num_bytes: int) -> Tensor:
        """uint8[num_engines, size], with room for so many bytes of rows. Not zero, but nothing beyond it is read."""
        aligned = -(-num_bytes // _NUMBER_BYTES) * _NUMBER_BYTES
        size = self._head_size * _NUMBER_BYTES + aligned
        return torch.empty((len(self._shares), size), dtype=torch.uint8, device=device)

    def _head(self, parcels: Tensor) -> Tensor:
        return parcels[..., : self._head_size * _NUMBER_BYTES].view(torch.int64)

    def _rows(self, parcel: Tensor, num_rows: int, width: int) -> Tensor:
        begin = self._head_size * _NUMBER_BYTES
        return parcel[begin : begin + num_rows * width].view(num_rows, width)
