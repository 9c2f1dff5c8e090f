"""Reading GGUF files, versions 2 and 3, little-endian. The file is untrusted: counts, lengths and offsets are checked.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The parser is our own because gguf.GGUFReader makes
several numpy arrays per string: seconds for a vocabulary of 50,000 tokens; this one takes tens of milliseconds.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncscale.errors import ModelLoadError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from gguf import GGMLQuantizationType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _BadFileError(Exception):
    """What is wrong with the file, without its name."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a GGUF file. shape: row-major, as numpy's (GGUF stores it reversed). type: its quantization."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    _raw: npt.NDArray[np.uint8] = field(repr=False)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values as a new, writable float32 array of `shape`. Raises ModelLoadError for a type that cannot be."""
        import gguf
        import numpy as np

        rows = self._raw.reshape(gguf.quants.quant_shape_to_byte_shape(self.shape, self.type))
        try:
            values = gguf.quants.dequantize(rows, self.type)
        except NotImplementedError as error:
            raise ModelLoadError(f"tensor {self.name!r} is of type {self.type.name}, which is not supported") from error
        values = values.reshape(self.shape)
        return values if values.flags.owndata and values.flags.writeable else np.array(values)


class GGUFFile:
    """A GGUF file, opened, checked and memory-mapped; the mapping lives as long as this or one of its tensors.

    ::

        file = GGUFFile("model.gguf")
        file.metadata["general.architecture"]                 # Python values; arrays are lists
        file.tensors["token_embd.weight"].dequantize()        # float32, (vocabulary, hidden)

    Raises ModelLoadError, naming the file and the defect.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                if not file.seek(0, os.SEEK_END):
                    raise _BadFileError("it is empty")
                self._parse(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (_BadFileError, OSError) as error:
            raise ModelLoadError(f"cannot read {self.path} as a GGUF file: {error}") from error

    def _parse(self, buffer: mmap.mmap) -> None:
        cursor = _Cursor(buffer)
        num_tensors, num_values = _read_header(cursor)
        self.metadata = _read_metadata(cursor, num_values)
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _BadFileError(f"its general.alignment is {alignment!r}, not a power of two")
        self.tensors = _read_tensors(cursor, num_tensors, alignment)


class _Cursor:
    """A position in the file that never leaves it."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.position = 0

    def check(self, num_bytes: int) -> None:
        if num_bytes > self.size - self.position:
            raise _BadFileError(
                f"it is truncated or damaged: {num_bytes} bytes are needed at offset {self.position} of {self.size}"
            )

    def unpack(self, fmt: struct.Struct) -> int:
        self.check(fmt.size)
        (value,) = fmt.unpack_from(self.buffer, self.position)
        self.position += fmt.size
        return int(value)

    def scalars(self, code: str, count: int) -> list[Any]:
        self.check(count * struct.calcsize("<" + code))
        fmt = struct.Struct(f"<{count}{code}")
        values = fmt.unpack_from(self.buffer, self.position)
        self.position += fmt.size
        return list(values)

    def strings(self, count: int) -> list[str]:
        self.check(count * _U64.size)
        buffer, position, size, unpack = self.buffer, self.position, self.size, _U64.unpack_from
        values = []
        for _ in range(count):
            if position + 8 > size:
                raise _BadFileError(f"it is truncated or damaged: a string at offset {position} of {size}")
            start = position + 8
            position = start + unpack(buffer, position)[0]
            if position > size:
                raise _BadFileError(f"it is truncated or damaged: a string at offset {start} reaches beyond its end")
            try:
                values.append(buffer[start:position].decode())
            except UnicodeDecodeError:
                raise _BadFileError(f"the string at offset {start} is not UTF-8") from None
        self.position = position
        return values

    def string(self) -> str:
        return self.strings(1)[0]


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    """How many tensors, how many metadata values."""
    if cursor.buffer[:4] != _MAGIC:
        raise _BadFileError(f"it does not begin with {_MAGIC!r}")
    cursor.position = 4
    version = cursor.unpack(_U32)
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        reason = "it is big-endian" if swapped in _VERSIONS else f"its version is {version}"
        raise _BadFileError(f"{reason}; supported are little-endian files of versions 2 and 3")
    num_tensors, num_values = cursor.unpack(_U64), cursor.unpack(_U64)
    cursor.check(24 * num_tensors + 13 * num_values)  # the least that so many can take
    return num_tensors, num_values


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            raise _BadFileError(f"its metadata has {key!r} twice")
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.unpack(_U32)
    if kind == _ARRAY:
        kind, count = cursor.unpack(_U32), cursor.unpack(_U64)
        return _read_values(cursor, key, kind, count)
    return _read_values(cursor, key, kind, 1)[0]


def _read_values(cursor: _Cursor, key: str, kind: int, count: int) -> list[Any]:
    if kind == _STRING:
        return cursor.strings(count)
    if kind in _SCALARS:
        return cursor.scalars(_SCALARS[kind], count)
    raise _BadFileError(f"the value of {key!r} is of the unknown or nested type {kind}")


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    descriptions = [_read_description(cursor) for _ in range(count)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in descriptions:
        if name in tensors:
            raise _BadFileError(f"it has the tensor {name!r} twice")
        if offset % alignment:
            raise _BadFileError(f"the offset {offset} of tensor {name!r} is not a multiple of {alignment}")
        tensors[name] = _map_tensor(cursor.buffer, name, shape, kind, data_start + offset)
    return tensors


def _read_description(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dimensions = cursor.unpack(_U32)
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise _BadFileError(f"tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(reversed(cursor.scalars("Q", num_dimensions)))
    if 0 in shape:
        raise _BadFileError(f"tensor {name!r} has the shape {shape}")
    return name, shape, cursor.unpack(_U32), cursor.unpack(_U64)


def _map_tensor(buffer: mmap.mmap, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    import gguf
    import numpy as np

    try:
        dtype = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise _BadFileError(f"tensor {name!r} is of the unknown type {kind}") from None
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
    if shape[-1] % block_size:
        raise _BadFileError(
            f"rows of tensor {name!r} have {shape[-1]} values, not a multiple of {block_size} ({dtype.name})"
        )
    num_bytes = math.prod(shape) // block_size * block_bytes
    if offset + num_bytes > len(buffer):
        raise _BadFileError(
            f"it is truncated: tensor {name!r} ends at byte {offset + num_bytes}, the file at {len(buffer)}"
        )
    return GGUFTensor(name, shape, dtype, np.frombuffer(buffer, np.uint8, num_bytes, offset))
