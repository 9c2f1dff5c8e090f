"""Where a step samples, and which samples count: those up to the first that differs from its draft.

A token is a pure function of its logits, its request's seed and its position. So a draft is right when the model itself
chooses that token there, and what is kept is bit by bit what would have been made one token at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asyncscale.engine.batch import Batch, Int32

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SamplePoints:
    """The tokens of a step after which the next one is sampled, in the batch's order.

    rows: int32, of the table; a row with d drafts is there 1 + d times, side by side. indices: int64, of the tokens
    among all new ones of the batch. positions: int32, of the token to be sampled, in its sequence.
    """

    rows: Int32
    indices: Int64
    positions: Int32


def sample_points(batch: Batch) -> SamplePoints:
    """After the last known token of each sequence that is complete with this batch, and after each of its drafts."""
    table, rows, counts, drafts = batch.table, batch.rows, batch.num_new_tokens, batch.num_drafts
    num_tokens = table.num_tokens[rows]
    if batch.num_decodes == rows.size and drafts is None:
        return SamplePoints(rows, np.arange(rows.size), num_tokens)
    last = counts.cumsum(dtype=np.int64) - 1  # of each row, among the new tokens
    known = counts if drafts is None else counts - drafts
    complete = np.flatnonzero(table.num_computed_tokens[rows] + known == num_tokens)
    if drafts is None:
        return SamplePoints(rows[complete], last[complete], num_tokens[complete])
    num_drafts = drafts[complete]
    num_points = num_drafts + 1
    ends = num_points.cumsum(dtype=np.int64)
    nth = np.arange(ends[-1] if ends.size else 0) - np.repeat(ends - num_points, num_points)  # of its row
    return SamplePoints(
        np.repeat(rows[complete], num_points),
        np.repeat(last[complete] - num_drafts, num_points) + nth,
        np.repeat(num_tokens[complete], num_points) + nth.astype(np.int32),
    )


def find_kept(batch: Batch, points: SamplePoints, token_ids: Int32) -> slice | Int64:
    """Of the tokens sampled at `points`, those that count, as an index: in each row, all up to the first whose draft
    differs. The last of a row has no draft."""
    if batch.num_drafts is None:
        return slice(None)
    table = batch.table
    differs = table.token_ids[points.rows, points.positions] != token_ids
    num_before = differs.cumsum() - differs  # of samples that differ, in any row
    starts = np.flatnonzero(points.positions == table.num_tokens[points.rows])
    lengths = np.diff(starts, append=points.rows.size)
    return np.flatnonzero(num_before == np.repeat(num_before[starts], lengths))
