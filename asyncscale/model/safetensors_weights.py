"""The tensors of safetensors files, mapped and widened to float32.

The format: https://huggingface.co/docs/safetensors. The library checks a file's header; the data are read here, because
numpy, which it would return them in, has no bfloat16.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.errors import ModelLoadError
from asyncscale.model.expert_tensors import common_name, expert_tensors
from asyncscale.suggestions import closest

Readers = dict[str, Callable[[], npt.NDArray[np.float32]]]

_STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
# Tensors that some checkpoints hold besides the weights, and that are derived from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias")


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in its file. dtype: the format's name of it. offset: of its first byte."""

    path: str
    buffer: mmap.mmap
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def element_bytes(self) -> int:
        return _STORED[self.dtype].itemsize if self.dtype in _STORED else 0  # of others nothing is read

    def read(self) -> npt.NDArray[np.float32]:
        count = int(np.prod(self.shape))
        values = np.frombuffer(self.buffer, _STORED[self.dtype], count, self.offset).reshape(self.shape)
        if self.dtype == "BF16":  # the upper half of a float32's bits
            return (values.astype(np.uint32) << 16).view(np.float32)
        exact: npt.NDArray[np.float32] = np.require(values, np.float32, "A")
        return exact


def read_safetensors(folder: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Readers:
    """Of every tensor of `shapes` a function that reads it. Raises ModelLoadError, naming file and tensor."""
    found = find_safetensors(_files(folder), config, shapes)
    missing = shapes.keys() - found.keys()
    if missing:
        raise ModelLoadError(f"{folder}: {len(missing)} tensors are missing, among them {min(missing)!r}")
    return found


def find_safetensors(paths: Iterable[str], config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Readers:
    """As `read_safetensors`, of those tensors of `shapes` that are in these files."""
    found: Readers = {}
    for path in paths:
        for stored_name, whole in _stored(path):
            for name, stored in _parts(common_name(stored_name), whole):
                if name in shapes:
                    found[name] = _checked(stored, stored_name, shapes[name]).read
                elif not _is_ignorable(name, config):
                    meant = closest(name, shapes)
                    hint = f"; did you mean {meant!r}?" if meant else ""
                    raise ModelLoadError(f"{path}: tensor {stored_name!r} is not part of a {config.architecture}{hint}")
    return found


def _files(folder: str) -> list[str]:
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        try:
            with open(index, "rb") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(f"cannot read {index} as an index of safetensors files: {error!r}") from error
    else:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if not names:
        raise ModelLoadError(f"{folder} holds no *.safetensors file")
    paths = [os.path.join(folder, name) for name in names]
    for path in paths:
        if not os.path.exists(path):
            raise ModelLoadError(f"{path}, which {index} lists, is missing")
    return paths


def _stored(path: str) -> Iterator[tuple[str, _Stored]]:
    try:
        with safe_open(path, "np"):  # raises unless header, offsets and the file's size fit
            pass
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path} as a safetensors file (truncated?): {error}") from error
    data = 8 + int.from_bytes(buffer[:8], "little")
    for name, entry in json.loads(buffer[8:data]).items():
        if name != "__metadata__":
            yield name, _Stored(path, buffer, entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0])


def _parts(name: str, stored: _Stored) -> Iterator[tuple[str, _Stored]]:
    """The tensor itself, or each expert's part of one that holds those of all experts."""
    tensors = expert_tensors(name, stored.shape)
    if not tensors:
        yield name, stored
    for tensor in tensors:
        offset = stored.offset + tensor.first_element * stored.element_bytes
        yield tensor.name, replace(stored, shape=tensor.shape, offset=offset)


def _checked(stored: _Stored, name: str, shape: tuple[int, ...]) -> _Stored:
    if stored.shape != shape:
        raise ModelLoadError(f"{stored.path}: tensor {name!r} has the shape {stored.shape}, expected {shape}")
    if stored.dtype not in _STORED:
        raise ModelLoadError(f"{stored.path}: tensor {name!r} is {stored.dtype}; supported are {', '.join(_STORED)}")
    return stored


def _is_ignorable(name: str, config: ModelConfig) -> bool:
    tied_copy = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_copy or name.endswith(_DERIVED)
