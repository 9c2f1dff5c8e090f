"""Guessing the next tokens of a text from where it said the same before."""

from __future__ import annotations

from collections.abc import Sequence

_SIZES = (4, 3, 2)  # of n-grams, longest first


class NgramIndex:
    """The tokens of one sequence, and where each of their n-grams occurred last.

    ::

        index = NgramIndex()
        index.extend(token_ids)     # those that are new since the last time
        drafts = index.propose(8)

    Takes about 0.4 KB per token.
    """

    __slots__ = ("_next", "_tokens")

    def __init__(self) -> None:
        self._tokens: list[int] = []
        # by size: n-gram -> position after it; of the newest one nobody knows yet what follows
        self._next: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in _SIZES)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append `token_ids` to the sequence."""
        tokens, start = self._tokens, len(self._tokens)
        tokens += token_ids
        end = len(tokens)
        for size, positions in zip(_SIZES, self._next, strict=True):
            for position in range(max(start, size), end):
                positions[tuple(tokens[position - size : position])] = position

    def propose(self, limit: int) -> list[int]:
        """What followed the longest n-gram that ends the sequence, where that occurred last; at most `limit` tokens.

        Where that runs into the end, the text repeats itself, and the guess is that it goes on to.
        """
        tokens = self._tokens
        for size, positions in zip(_SIZES, self._next, strict=True):
            start = positions.get(tuple(tokens[-size:]))
            if start is not None:
                drafts = tokens[start : start + limit]
                while len(drafts) < limit:
                    drafts += drafts[: limit - len(drafts)]
                return drafts
        return []
