"""Which tokens a sequence holds and how often it generated them, kept up to date token by token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


class TokenCounts:
    """Counts of generated tokens; memory grows with the number of different tokens, not with the vocabulary.

    ::

        counts = TokenCounts(prompt_token_ids)
        counts.extend(new_token_ids)
        counts.token_ids, counts.counts     # int64[u] each: the different tokens; how often each was generated

    num_generated: how many generated tokens were counted.
    """

    def __init__(self, prompt_token_ids: npt.NDArray[np.integer]) -> None:
        self._ids = np.unique(prompt_token_ids).astype(np.int64)
        self._counts = np.zeros(len(self._ids), np.int64)
        self._index = {token_id: i for i, token_id in enumerate(self._ids.tolist())}
        self.num_generated = 0

    @property
    def token_ids(self) -> Int64:
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> Int64:
        return self._counts[: len(self._index)]

    def extend(self, token_ids: npt.NDArray[np.integer]) -> None:
        """Count further generated tokens."""
        for token_id in token_ids.tolist():
            index = self._index.setdefault(token_id, len(self._index))
            if index == len(self._ids):
                self._grow()
            self._ids[index] = token_id
            self._counts[index] += 1
        self.num_generated += len(token_ids)

    def _grow(self) -> None:
        room = np.zeros(max(16, len(self._ids)), np.int64)
        self._ids, self._counts = np.append(self._ids, room), np.append(self._counts, room)
