"""Where a step samples and what it keeps, against the same done one row and one token at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asyncscale.engine.batch import Batch, SequenceTable
from asyncscale.engine.verification import find_kept, sample_points

ROWS = st.lists(
    st.tuples(
        st.booleans(),  # decodes, else prefills
        st.integers(1, 6),  # known tokens not computed yet, if it prefills
        st.integers(0, 5),  # of these not in this batch's chunk
        st.lists(st.integers(0, 2), max_size=3),  # drafts, if it decodes
        st.lists(st.integers(0, 2), min_size=4, max_size=4),  # what the model samples
    ),
    min_size=1,
    max_size=6,
)


@given(rows=ROWS, seed=st.integers(0, 100))
def test_each_row_keeps_what_it_would_have_got_one_by_one(rows, seed):
    rows = sorted(rows, key=lambda row: not row[0])
    table = SequenceTable(len(rows), 40, 4)
    places = np.random.default_rng(seed).permutation(len(rows)).astype(np.int32)
    counts, drafts, expected, samples, num_new = [], [], [], [], 0
    for place, (decodes, remaining, left, guesses, sampled) in zip(places, rows, strict=True):
        table.num_tokens[place] = 10 + place
        known = 1 if decodes else max(remaining - left, 1)
        table.num_computed_tokens[place] = 10 + place - (1 if decodes else remaining)
        guesses = guesses if decodes else []
        table.token_ids[place, 10 + place : 10 + place + len(guesses)] = guesses
        counts.append(known + len(guesses))
        drafts.append(len(guesses))
        if decodes or known == remaining:
            right = next((i for i, guess in enumerate(guesses) if guess != sampled[i]), len(guesses))
            expected += [(place, 10 + place + i, sampled[i]) for i in range(right + 1)]
            samples += [(place, num_new + known - 1 + i, 10 + place + i, sampled[i]) for i in range(len(guesses) + 1)]
        num_new += counts[-1]
    num_decodes = sum(row[0] for row in rows)
    num_drafts = np.array(drafts, np.int32) if any(drafts) else None
    batch = Batch(table, places, np.array(counts, np.int32), num_decodes, num_drafts)
    points = sample_points(batch)
    asked = zip(points.rows.tolist(), points.indices.tolist(), points.positions.tolist(), strict=True)
    assert list(asked) == [sample[:3] for sample in samples]
    token_ids = np.array([sample[3] for sample in samples], np.int32)
    kept = find_kept(batch, points, token_ids)
    got = zip(points.rows[kept].tolist(), points.positions[kept].tolist(), token_ids[kept].tolist(), strict=True)
    assert list(got) == expected
