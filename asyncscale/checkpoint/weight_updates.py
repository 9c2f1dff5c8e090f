"""The files of an update of a model's weights: what the user names, and the owner's copies of it.

They are copied because a training loop writes the same path again and again, while an engine that is started later must
get the weights that the others have.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from asyncscale.checkpoint.integrity import check_safetensors, weight_files
from asyncscale.config import WeightUpdate
from asyncscale.errors import ModelLoadError

_CHUNK_BYTES = 2**20


def update_files(path: str) -> list[Path]:
    """The safetensors files at `path`, which is one, or a folder of them with or without an index; all of them whole.

    Raises ModelLoadError, which says what is wrong with which file.
    """
    try:
        found = Path(path)
        if not found.exists():
            raise ModelLoadError(f"the weights {path} do not exist: pass a *.safetensors file, or a folder of them")
        files = weight_files(found) if found.is_dir() else [found]
        for file in files:
            check_safetensors(file)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        raise ModelLoadError(f"cannot read {path[:100]!r} as weights: {error}") from None
    return files


def copy_update(files: Sequence[Path], folder: Path) -> WeightUpdate:
    """Copies of the files in a new folder. Raises ModelLoadError where there is no room for them."""
    content = hashlib.sha256()
    copies = []
    try:
        folder.mkdir(mode=0o700, parents=True)
        for number, file in enumerate(files):
            copy = folder / f"{number}.safetensors"
            with file.open("rb") as source, copy.open("wb") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    content.update(chunk)
                    target.write(chunk)
            content.update(copy.stat().st_size.to_bytes(8))
            copies.append(str(copy))
    except OSError as error:
        remove_copies(folder)
        raise ModelLoadError(f"cannot copy the weights to {folder}: {error}. TMPDIR says where to") from error
    return WeightUpdate(paths=tuple(copies), sha256=content.hexdigest())


def remove_copies(folder: Path) -> None:
    """The weights are not wanted any more."""
    shutil.rmtree(folder, ignore_errors=True)
