"""Token ids as clients keep them: array("i"), int32, which needs no numpy. Importing that takes a tenth of a second."""

from __future__ import annotations

import operator
import sys
from array import array
from collections.abc import Sequence


def make_token_ids(values: object) -> array[int]:
    """A sequence of integers, or a one-dimensional numpy array of them, as a new array of int32.

    It is of int64 where that is too small, for whoever checks their range. Raises TypeError or OverflowError for
    anything else.
    """
    integers = _integers(values)
    try:
        return array("i", integers)
    except OverflowError:
        return array("q", integers)


def wire_bytes(token_ids: array[int]) -> bytes:
    """As `messages.Add` holds them: little-endian."""
    if sys.byteorder == "big":
        token_ids = token_ids[:]
        token_ids.byteswap()
    return token_ids.tobytes()


def _integers(values: object) -> list[int]:
    if type(values) is list and set(map(type, values)) == {int}:  # as nearly always, and several times faster
        return values
    numpy = sys.modules.get("numpy")  # who has an array has imported it
    if numpy is not None and isinstance(values, numpy.ndarray):
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise TypeError("not a sequence of integers")
        integers: list[int] = values.tolist()
        return integers
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray | memoryview):
        raise TypeError("not a sequence")
    if any(isinstance(value, bool) for value in values):
        raise TypeError("not a sequence of integers")
    return list(map(operator.index, values))
