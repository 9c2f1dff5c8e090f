"""A file of arrays that processes map side by side, and that shows whether it is whole.

    8 bytes    magic
    4 bytes    version of this format, little-endian like all that follows
    4 bytes    length of the header
    32 bytes   SHA-256 of the header
    header     JSON: content, what the file was made from; data_offset, data_bytes; checksum of the data; tensors, each
               with dtype (numpy's name), shape, and offset into the data, a multiple of 64
    data       from a multiple of 4,096 on, to the file's end

The checksum must be quick enough to be compared whenever the file is mapped: 64-bit sums of 512 bytes each (the least
that disks write at once), modulo 2**64; and of all those sums the SHA-256. It finds changed bits, and parts that are
missing, zero or in other places. It is no protection from somebody who may write to the folder.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from asyncscale.model.packing import TensorSpec

Arrays = dict[str, npt.NDArray[Any]]

_MAGIC = b"ASWEIGHT"
_VERSION = 1
_PREFIX = struct.Struct("<8sII32s")
_PAGE = 4096
_ALIGNMENT = 64
_SECTOR = 512
_LONGEST_HEADER = 100_000_000


class DamagedFileError(Exception):
    """What is wrong with a weight file, without its name."""


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Header(msgspec.Struct, frozen=True):
    content: str
    data_offset: int
    data_bytes: int
    checksum: str
    tensors: dict[str, _Tensor]


class WeightFileWriter:
    """Makes an empty file one of zeros, whose arrays can then be filled in place::

        writer = WeightFileWriter(descriptor, specs, content)
        writer.tensors["norm"][:] = 1
        writer.finish()                 # before that, nobody takes it for a weight file

    descriptor: of a file that is open for reading and writing, and stays open. Raises OSError where there is no room
    for it: the writing itself cannot fail then.
    """

    tensors: Arrays

    def __init__(self, descriptor: int, specs: Mapping[str, TensorSpec], content: str) -> None:
        self._descriptor = descriptor
        self._header = _plan(specs, content)
        size = self._header.data_offset + self._header.data_bytes
        os.ftruncate(descriptor, 0)
        _reserve(descriptor, size)
        self._memory = mmap.mmap(descriptor, size)
        self.tensors = _arrays(self._memory, self._header)

    def finish(self) -> None:
        """Writes checksum and header; the arrays are not to be changed any more."""
        header = msgspec.structs.replace(self._header, checksum=_checksum(self._memory, self._header))
        encoded = msgspec.json.encode(header)
        prefix = _PREFIX.pack(_MAGIC, _VERSION, len(encoded), hashlib.sha256(encoded).digest())
        os.pwrite(self._descriptor, prefix + encoded, 0)


def weight_file_bytes(specs: Mapping[str, TensorSpec], content: str) -> int:
    """How large a file of these arrays is."""
    header = _plan(specs, content)
    return header.data_offset + header.data_bytes


def map_weight_file(descriptor: int, content: str) -> Arrays:
    """Its arrays, which cannot be written. They hold the mapping, and that a duplicate of the descriptor.

    Every byte is verified, which also maps all of its pages. Raises DamagedFileError where the file is not whole, or
    not of this content; OSError where it cannot be mapped.
    """
    size = os.fstat(descriptor).st_size
    header = _read_header(descriptor, size)
    if header.content != content:
        raise DamagedFileError("it was made from something else")
    if size != header.data_offset + header.data_bytes:
        raise DamagedFileError(f"it has {size} bytes instead of {header.data_offset + header.data_bytes}")
    memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | _POPULATE, prot=mmap.PROT_READ)
    if _checksum(memory, header) != header.checksum:
        raise DamagedFileError("its checksum is wrong")
    return _arrays(memory, header)


_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # Linux: one call instead of a page fault for every few pages


def _plan(specs: Mapping[str, TensorSpec], content: str) -> _Header:
    """The header, with a checksum of the right length."""
    tensors = {}
    end = 0
    for name, spec in specs.items():
        tensors[name] = _Tensor(spec.dtype, spec.shape, end)
        end = _aligned(end + spec.num_bytes, _ALIGNMENT)
    data_bytes = _aligned(end, _SECTOR)
    header = _Header(content, 0, data_bytes, "0" * 64, tensors)
    longest = len(msgspec.json.encode(header)) + len(str(1 << 63))
    return msgspec.structs.replace(header, data_offset=_aligned(_PREFIX.size + longest, _PAGE))


def _read_header(descriptor: int, size: int) -> _Header:
    prefix = os.pread(descriptor, _PREFIX.size, 0)
    if len(prefix) < _PREFIX.size:
        raise DamagedFileError("it is truncated")
    magic, version, length, digest = _PREFIX.unpack(prefix)
    if magic != _MAGIC or version != _VERSION:
        raise DamagedFileError("it is not a weight file of this version")
    if length > min(size, _LONGEST_HEADER):
        raise DamagedFileError("it is truncated")
    encoded = os.pread(descriptor, length, _PREFIX.size)
    if hashlib.sha256(encoded).digest() != digest:
        raise DamagedFileError("its header is damaged")
    try:
        return msgspec.json.decode(encoded, type=_Header)
    except msgspec.MsgspecError as error:
        raise DamagedFileError(f"its header cannot be read: {error}") from error


def _arrays(memory: mmap.mmap, header: _Header) -> Arrays:
    return {
        name: np.frombuffer(
            memory,
            tensor.dtype,
            int(np.prod(tensor.shape, dtype=np.int64)),
            header.data_offset + tensor.offset,
        ).reshape(tensor.shape)
        for name, tensor in header.tensors.items()
    }


def _checksum(memory: mmap.mmap, header: _Header) -> str:
    words = np.frombuffer(memory, np.uint64, header.data_bytes // 8, header.data_offset)
    return hashlib.sha256(words.reshape(-1, _SECTOR // 8).sum(axis=1)).hexdigest()


def _reserve(descriptor: int, size: int) -> None:
    """Room on the disk: a full one would otherwise kill whoever writes to the mapping."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(1 << 20)
    for start in range(0, size, len(zeros)):
        os.pwrite(descriptor, zeros[: size - start], start)


def _aligned(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
