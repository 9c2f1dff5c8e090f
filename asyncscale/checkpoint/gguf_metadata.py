"""The first part of a GGUF file, its metadata. It is untrusted: counts and lengths are checked."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from asyncscale.errors import ModelLoadError

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class BadFileError(Exception):
    """What is wrong with a file, without its name."""

    def named(self, path: str) -> ModelLoadError:
        """The error that users see."""
        return ModelLoadError(f"cannot read {path} as a GGUF file: {self}")


class Cursor:
    """A position in the file that never leaves it."""

    def __init__(self, buffer: mmap.mmap, position: int = 0) -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.position = position

    def check(self, num_bytes: int) -> None:
        """Raises BadFileError unless so many bytes follow."""
        if num_bytes > self.size - self.position:
            raise BadFileError(
                f"it is truncated or damaged: {num_bytes} bytes are needed at offset {self.position} of {self.size}"
            )

    def skip(self, num_bytes: int) -> None:
        """Go on behind so many bytes."""
        self.check(num_bytes)
        self.position += num_bytes

    def unpack(self, fmt: struct.Struct) -> int:
        """The one integer of `fmt` that is next."""
        self.check(fmt.size)
        (value,) = fmt.unpack_from(self.buffer, self.position)
        self.position += fmt.size
        return int(value)

    def scalars(self, code: str, count: int) -> list[Any]:
        """The next `count` values of the struct module's type `code`."""
        start = self.position
        self.skip(count * struct.calcsize("<" + code))
        return list(struct.unpack_from(f"<{count}{code}", self.buffer, start))

    def strings(self, count: int) -> list[str]:
        """The next `count` strings."""
        self.check(count * U64.size)
        buffer, position, size, unpack = self.buffer, self.position, self.size, U64.unpack_from
        values = []
        for _ in range(count):
            if position + 8 > size:
                raise BadFileError(f"it is truncated or damaged: a string at offset {position} of {size}")
            start = position + 8
            position = start + unpack(buffer, position)[0]
            if position > size:
                raise BadFileError(f"it is truncated or damaged: a string at offset {start} reaches beyond its end")
            try:
                values.append(buffer[start:position].decode())
            except UnicodeDecodeError:
                raise BadFileError(f"the string at offset {start} is not UTF-8") from None
        self.position = position
        return values

    def skip_strings(self, count: int) -> None:
        """Go on behind `count` strings, without a look at their characters."""
        self.check(count * U64.size)
        buffer, position, last, unpack = self.buffer, self.position, self.size - 8, U64.unpack_from
        for _ in range(count):
            if position > last:
                raise BadFileError(f"it is truncated or damaged: a string before offset {position} of {self.size}")
            position += 8 + unpack(buffer, position)[0]
        if position > self.size:
            raise BadFileError("it is truncated or damaged: a string reaches beyond its end")
        self.position = position

    def string(self) -> str:
        """The next string."""
        return self.strings(1)[0]


class _Array(NamedTuple):
    """An array that nobody has asked for yet."""

    kind: int
    length: int
    position: int


class Metadata(Mapping[str, Any]):
    """A file's metadata: Python values; arrays are lists, made when they are asked for.

    A vocabulary takes most of the time of reading a header, and engines do not need it.
    Asking for an array whose strings are damaged raises ModelLoadError.
    """

    def __init__(self, cursor: Cursor, count: int, path: str) -> None:
        self._buffer = cursor.buffer
        self._path = path
        self._values: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.string()
            if key in self._values:
                raise BadFileError(f"its metadata has {key!r} twice")
            self._values[key] = _read_value(cursor, key)

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Array):
            try:
                value = _read_values(Cursor(self._buffer, value.position), value.kind, value.length)
            except BadFileError as error:
                raise error.named(self._path) from error
            self._values[key] = value
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _read_value(cursor: Cursor, key: str) -> Any:
    kind, count = cursor.unpack(U32), None
    if kind == _ARRAY:
        kind, count = cursor.unpack(U32), cursor.unpack(U64)
    if kind != _STRING and kind not in _SCALARS:
        raise BadFileError(f"the value of {key!r} is of the unknown or nested type {kind}")
    if count is None:
        return _read_values(cursor, kind, 1)[0]
    array = _Array(kind, count, cursor.position)
    if kind == _STRING:
        cursor.skip_strings(count)
    else:
        cursor.skip(count * struct.calcsize("<" + _SCALARS[kind]))
    return array


def _read_values(cursor: Cursor, kind: int, count: int) -> list[Any]:
    return cursor.strings(count) if kind == _STRING else cursor.scalars(_SCALARS[kind], count)
