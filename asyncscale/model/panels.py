"""How a linear layer lies in memory for the native kernels, and how its rows get there.

A weight [outputs, inputs] is cut into panels of 64 outputs. A panel holds, for each group of inputs that the CPU
multiplies at once (`ElementType.group`), that group of every one of its outputs: [inputs / group, width, group]. So the
kernels read memory from its beginning to its end. Outputs are padded to a multiple of 16, the last panel may be
narrower; inputs to a multiple of the group. Padding is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

PANEL = 64
OUTPUT_MULTIPLE = 16

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # below it, float32 loses digits


@dataclass(frozen=True, slots=True)
class ElementType:
    """What a weight's elements are stored as. dtype: numpy's; bfloat16 is uint16, its bits; int8 is uint8, 128 more.

    group: how many products the CPU sums in one instruction per output.
    """

    name: str
    dtype: str
    group: int

    @property
    def group_dtype(self) -> str:
        """An unsigned integer as large as a group, which is moved as one."""
        return f"uint{8 * self.group * np.dtype(self.dtype).itemsize}"


ELEMENT_TYPES = {
    element.name: element
    for element in (
        ElementType("float32", "float32", 1),
        ElementType("float16", "float16", 1),
        ElementType("bfloat16", "uint16", 2),
        ElementType("int8", "uint8", 4),
    )
}


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is no less than `number`."""
    return -(-number // multiple) * multiple


def bfloat16_bits(values: Float32) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result = rounded.astype(np.uint16)
    if not np.isfinite(values.max(initial=0.0)):  # a NaN's bits may have overflowed
        result[np.isnan(values)] = 0x7FC0
    return result


def quantize(rows: Float32) -> tuple[npt.NDArray[np.uint8], Float32]:
    """Each row in whole numbers from -127 to 127 times the row's scale, stored as 128 more; and the scales.

    The scale of a row of zeros is zero; that of a row with an infinity or a NaN is NaN.
    """
    scales: Float32 = np.maximum(rows.max(axis=1), -rows.min(axis=1)) / np.float32(127)
    scales[scales < _SMALLEST_SCALE] = 0
    scales[~np.isfinite(scales)] = np.nan
    usable = scales > 0  # and not NaN
    divisors: Float32 = np.where(usable, scales, np.float32(1))
    values = rows / divisors[:, None]
    np.rint(values, out=values)
    values[~usable] = 0
    values += 128
    return values.astype(np.uint8), scales


class PackedLinear:
    """The arrays of one packed linear layer, zero at first, while its rows are written.

    ::

        linear = PackedLinear({"weight": weight, "bias": bias}, element, num_inputs)
        linear.write(queries, Columns(0))
        linear.write(keys, Columns(len(queries)))

    arrays: "weight", flat, and of each output "bias" where there is one, "scales" where the type needs them.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], element: ElementType, padded_inputs: int) -> None:
        self._element = element
        self._padded_inputs = padded_inputs
        self._weight = arrays["weight"]
        self._bias = arrays.get("bias")
        self._scales = arrays.get("scales")
        self._padded_outputs = len(self._weight) // padded_inputs

    def write(self, rows: Float32, columns: Columns) -> None:
        """rows: [outputs, inputs]. columns: which of the layer's outputs they are."""
        for part, first, last in columns.runs(len(rows), self._padded_outputs):
            self._write_run(rows[part], first, last)

    def write_bias(self, values: Float32, columns: Columns) -> None:
        assert self._bias is not None
        for part, first, last in columns.runs(len(values), self._padded_outputs):
            self._bias[first:last] = values[part]

    def _write_run(self, rows: Float32, first: int, last: int) -> None:
        start = first // PANEL * PANEL
        groups = self._groups(self._encode(rows, first, last))
        self._panel(start)[: groups.shape[1], first - start : last - start] = groups.T

    def _panel(self, start: int) -> npt.NDArray[Any]:
        """The panel whose first output is `start`: [groups, width], each group one integer."""
        width = min(PANEL, self._padded_outputs - start)
        flat = self._weight[start * self._padded_inputs : (start + width) * self._padded_inputs]
        return flat.view(self._element.group_dtype).reshape(-1, width)

    def _encode(self, rows: Float32, first: int, last: int) -> npt.NDArray[Any]:
        if self._scales is not None:
            quantized, self._scales[first:last] = quantize(rows)
            return quantized
        return encode(rows, self._element.name)

    def _groups(self, encoded: npt.NDArray[Any]) -> npt.NDArray[Any]:
        missing = -encoded.shape[1] % self._element.group
        if missing:
            encoded = np.pad(encoded, ((0, 0), (0, missing)))
        return encoded.view(self._element.group_dtype)


def encode(values: Float32, element: str) -> npt.NDArray[Any]:
    """In an element type that needs no scales. Raises OverflowError where a value is too large for it."""
    if element == "bfloat16":
        return bfloat16_bits(values)
    if element == "float16":
        with np.errstate(over="raise", under="ignore"):
            try:
                return values.astype(np.float16)
            except FloatingPointError:
                raise OverflowError(f"{np.abs(values).max()} is too large for float16") from None
    return values


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a matrix's rows go among the outputs of a packed layer: from `first` on, one after the other.

    half: 0 or 1 for a matrix that shares each panel with another: gate has a panel's first half, up its second.
    """

    first: int = 0
    half: int | None = None

    def runs(self, num_rows: int, padded_outputs: int) -> Iterator[tuple[slice, int, int]]:
        """Rows that stay together in one panel: which they are, and their first and last (exclusive) output."""
        row = 0
        while row < num_rows:
            first, room = self._place(row, padded_outputs)
            count = min(room, num_rows - row)
            yield slice(row, row + count), first, first + count
            row += count

    def _place(self, row: int, padded_outputs: int) -> tuple[int, int]:
        """The output of a row, and how many outputs from there on are its neighbours' too."""
        if self.half is None:
            output = self.first + row
            return output, PANEL - output % PANEL
        panel, offset = divmod(row, PANEL // 2)
        width = min(PANEL, padded_outputs - panel * PANEL)
        return panel * PANEL + self.half * width // 2 + offset, width // 2 - offset
