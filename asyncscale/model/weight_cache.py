"""A model's packed weights, made once per host: engines map the same file, and so the same memory.

The files are in the folder `weights` of the cache (see checkpoint/cache.py), each named by the SHA-256 of all that it
was made from: the checkpoint's files, the configuration, the format. `NAME.weights` is complete; `NAME.building` is
being made, or was when its maker was killed. Who has locked (flock) the latter makes it; the others wait for the lock,
which the system frees when its holder ends, however it ends. Who uses a file holds a shared lock on it.

Nothing is synced to disk: what a crash of the system leaves of a file is found by the checksum, which is compared
whenever the file is mapped, and then it is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from asyncscale.checkpoint.cache import cache_folder
from asyncscale.checkpoint.integrity import weight_files
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.config import CheckpointFiles
from asyncscale.model.content_digest import ContentDigest
from asyncscale.model.file_lock import exclusive_file
from asyncscale.model.packing import (
    PACKING_VERSION,
    Packer,
    TensorSpec,
    WeightFormat,
    head_format,
    packed_specs,
)
from asyncscale.model.weight_cache_room import DoesNotFitError, make_room
from asyncscale.model.weight_file import (
    Arrays,
    DamagedFileError,
    WeightFileWriter,
    map_weight_file,
    weight_file_bytes,
)
from asyncscale.model.weights import Progress, read_rope_factors, read_weights

_log = logging.getLogger(__name__)

_ROPE_FACTORS = "rope_factors"


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """tensors: as packing.py lists them; they cannot be written, and start at multiples of 64 bytes.

    rope_factors: float32[head_dim / 2], divisors of RoPE's frequencies, where the checkpoint has them.
    passing_path: of their file, where it is of no use when nobody has it mapped any more: that of an update.
    """

    tensors: Arrays
    rope_factors: npt.NDArray[np.float32] | None
    passing_path: Path | None = None


def packed_weights(
    files: CheckpointFiles,
    config: ModelConfig,
    weight_format: WeightFormat,
    progress: Progress | None = None,
) -> PackedWeights:
    """The weights of `files` for the native kernels, from the cache; made where they are not there.

    ::

        weights = packed_weights(files, ModelConfig.load(files), "bfloat16")
        weights.tensors["layers.0.qkv.weight"]

    Where nothing can be cached, they are this process's own, and a warning says why. `progress` is called with the
    fraction that is done. Raises ModelLoadError where the checkpoint cannot be read.
    """
    source = _Source(files, config, weight_format, progress or (lambda fraction: None))
    try:
        tensors = _from_cache(source)
    except (OSError, DoesNotFitError) as error:
        _log.warning(
            "each engine packs and holds its own copy of the weights, because they cannot be kept in %s: %s. "
            "Set the environment variable ASYNCSCALE_CACHE to a folder that can be written and has room",
            _folder(),
            error,
        )
        tensors = _own(source)
    source.progress(1.0)
    rope_factors = tensors.pop(_ROPE_FACTORS, None)
    return PackedWeights(tensors, rope_factors, _path(source) if files.updates else None)


class _Source:
    """What packed weights are made from. content: the SHA-256 of it."""

    def __init__(
        self, files: CheckpointFiles, config: ModelConfig, weight_format: WeightFormat, progress: Progress
    ) -> None:
        self._files = files
        self._config = config
        self._format = weight_format
        self.progress = progress
        path = Path(files.path)
        paths = [path] if files.format == "gguf" else weight_files(path)
        self._digest = ContentDigest(paths, _folder() / "digests")
        updates = [update.sha256 for update in files.updates]
        listing = [PACKING_VERSION, sys.byteorder, weight_format, head_format(weight_format), config, *updates]
        self.content = hashlib.sha256(msgspec.json.encode([self._digest.sha256, *listing])).hexdigest()

    def specs(self) -> dict[str, TensorSpec]:
        """The arrays to be filled."""
        specs = packed_specs(self._config, self._format)
        if read_rope_factors(self._files, self._config) is not None:
            specs[_ROPE_FACTORS] = TensorSpec("float32", (self._config.head_dim // 2,))
        return specs

    def fill(self, tensors: Arrays) -> None:
        """Writes the weights into arrays of zeros. Raises ModelLoadError where the files are not those of `content`."""
        packer = Packer(self._config, self._format, tensors)
        for name, values in read_weights(self._files, self._config, self.progress):
            packer.write(name, values)
        if _ROPE_FACTORS in tensors:
            tensors[_ROPE_FACTORS][:] = read_rope_factors(self._files, self._config)
        self._digest.check_unchanged()


def _folder() -> Path:
    return cache_folder() / "weights"


def _path(source: _Source) -> Path:
    return _folder() / f"{source.content}.weights"


def _from_cache(source: _Source) -> Arrays:
    path = _path(source)
    with contextlib.suppress(FileNotFoundError, DamagedFileError):
        return _mapped(path, source.content)
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_suffix(".building")
    with exclusive_file(building) as descriptor:
        try:
            return _mapped(path, source.content)  # it was made while this process waited for the lock
        except FileNotFoundError:
            pass
        except DamagedFileError as error:
            _log.warning("the packed weights in %s are made again: %s", path, error)
        _log.info("packing the weights for the native kernels, once, into %s", path)
        specs = source.specs()
        make_room(path.parent, weight_file_bytes(specs, source.content))
        tensors = _write(source, specs, descriptor)
        os.replace(building, path)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return tensors


def _mapped(path: Path, content: str) -> Arrays:
    """The arrays of a file, which is locked as one in use. Raises FileNotFoundError or DamagedFileError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # held by the mapping's duplicate of the descriptor
        with contextlib.suppress(OSError):
            os.utime(descriptor)  # of all files, it is the one that was used last
        return map_weight_file(descriptor, content)
    finally:
        os.close(descriptor)


def _own(source: _Source) -> Arrays:
    """In memory of this process."""
    with contextlib.ExitStack() as stack:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("asyncscale-weights", os.MFD_CLOEXEC)
            stack.callback(os.close, descriptor)
        else:
            descriptor = stack.enter_context(tempfile.TemporaryFile()).fileno()
        return _write(source, source.specs(), descriptor)


def _write(source: _Source, specs: dict[str, TensorSpec], descriptor: int) -> Arrays:
    writer = WeightFileWriter(descriptor, specs, source.content)
    source.fill(writer.tensors)
    writer.finish()
    try:
        return map_weight_file(descriptor, source.content)
    except DamagedFileError as error:
        raise OSError(f"what was written is damaged: {error}") from error
