"""Reading GGUF files, versions 2 and 3, little-endian. The file is untrusted: counts, lengths and offsets are checked.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The parser is our own because gguf.GGUFReader makes
several numpy arrays per string: seconds for a vocabulary of 50,000 tokens; this one takes ten milliseconds.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncscale.checkpoint.gguf_metadata import U32, U64, BadFileError, Cursor, Metadata
from asyncscale.checkpoint.gguf_types import TYPES, GGUFType
from asyncscale.errors import ModelLoadError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a GGUF file. shape: row-major, as numpy's (GGUF stores it reversed). type: its quantization."""

    name: str
    shape: tuple[int, ...]
    type: GGUFType
    _raw: memoryview = field(repr=False)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values as a new, writable float32 array of `shape`. Raises ModelLoadError for a type that cannot be."""
        import gguf
        import numpy as np

        rows = np.frombuffer(self._raw, np.uint8).reshape(*self.shape[:-1], -1)
        try:
            values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[self.type.name])
        except NotImplementedError as error:
            raise ModelLoadError(f"tensor {self.name!r} is of type {self.type.name}, which is not supported") from error
        values = values.reshape(self.shape)
        return values if values.flags.writeable else values.copy()  # of a type that is not quantized: the file itself


class GGUFFile:
    """A GGUF file, opened, checked and memory-mapped; the mapping lives as long as this or one of its tensors.

    ::

        file = GGUFFile("model.gguf")
        file.metadata["general.architecture"]                 # Python values; arrays are lists
        file.tensors["token_embd.weight"].dequantize()        # float32, (vocabulary, hidden)

    Raises ModelLoadError, naming the file and the defect.
    """

    metadata: Metadata
    tensors: dict[str, GGUFTensor]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                if not file.seek(0, os.SEEK_END):
                    raise BadFileError("it is empty")
                self._parse(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except BadFileError as error:
            raise error.named(self.path) from error
        except OSError as error:
            raise ModelLoadError(f"cannot read {self.path} as a GGUF file: {error}") from error

    def _parse(self, buffer: mmap.mmap) -> None:
        cursor = Cursor(buffer)
        num_tensors, num_values = _read_header(cursor)
        self.metadata = Metadata(cursor, num_values, self.path)
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise BadFileError(f"its general.alignment is {alignment!r}, not a power of two")
        self.tensors = _read_tensors(cursor, num_tensors, alignment)


def _read_header(cursor: Cursor) -> tuple[int, int]:
    """How many tensors, how many metadata values."""
    if cursor.buffer[:4] != _MAGIC:
        raise BadFileError(f"it does not begin with {_MAGIC!r}")
    cursor.position = 4
    version = cursor.unpack(U32)
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        reason = "it is big-endian" if swapped in _VERSIONS else f"its version is {version}"
        raise BadFileError(f"{reason}; supported are little-endian files of versions 2 and 3")
    num_tensors, num_values = cursor.unpack(U64), cursor.unpack(U64)
    cursor.check(24 * num_tensors + 13 * num_values)  # the least that so many can take
    return num_tensors, num_values


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    descriptions = [_read_description(cursor) for _ in range(count)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in descriptions:
        if name in tensors:
            raise BadFileError(f"it has the tensor {name!r} twice")
        if offset % alignment:
            raise BadFileError(f"the offset {offset} of tensor {name!r} is not a multiple of {alignment}")
        tensors[name] = _map_tensor(cursor.buffer, name, shape, kind, data_start + offset)
    return tensors


def _read_description(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dimensions = cursor.unpack(U32)
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise BadFileError(f"tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(reversed(cursor.scalars("Q", num_dimensions)))
    if 0 in shape:
        raise BadFileError(f"tensor {name!r} has the shape {shape}")
    return name, shape, cursor.unpack(U32), cursor.unpack(U64)


def _map_tensor(buffer: mmap.mmap, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    if kind not in TYPES:
        raise BadFileError(f"tensor {name!r} is of the unknown type {kind}")
    type_name, block_size, block_bytes = TYPES[kind]
    if shape[-1] % block_size:
        raise BadFileError(
            f"rows of tensor {name!r} have {shape[-1]} values, not a multiple of {block_size} ({type_name})"
        )
    end = offset + math.prod(shape) // block_size * block_bytes
    if end > len(buffer):
        raise BadFileError(f"it is truncated: tensor {name!r} ends at byte {end}, the file at {len(buffer)}")
    return GGUFTensor(name, shape, TYPES[kind], memoryview(buffer)[offset:end])
