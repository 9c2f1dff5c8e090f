"""Cheap checks of a model's files before any engine starts: is all there, and is it whole? Reads headers only."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import msgspec

from asyncscale.checkpoint.gguf_file import GGUFFile
from asyncscale.checkpoint.nearby import models_inside
from asyncscale.errors import ModelLoadError

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_gguf(path: Path) -> None:
    """Raises ModelLoadError unless `path` is a whole GGUF file of a language model, with its tokenizer."""
    metadata = GGUFFile(path).metadata
    if not isinstance(metadata.get("general.architecture"), str):
        raise ModelLoadError(f"{path} is no model: its metadata has no general.architecture")
    if metadata.get("split.count", 1) != 1:
        raise ModelLoadError(
            f"{path} is one part of a model split over {metadata['split.count']} files; "
            "join them with `llama-gguf-split --merge` first"
        )
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.tokens"):
        if key not in metadata:
            raise ModelLoadError(f"{path} has no tokenizer: its metadata has no {key}")


def check_folder(folder: Path) -> None:
    """Raises ModelLoadError unless `folder` holds config.json, tokenizer.json and whole *.safetensors weights."""
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"{folder} is no model folder: it has no config.json{_gguf_hint(folder) or _inside_hint(folder)}"
        )
    read_json_object(folder / "config.json")
    for shard in weight_files(folder):
        check_safetensors(shard)
    if not (folder / "tokenizer.json").is_file():
        raise ModelLoadError(f"the tokenizer of {folder} is missing: it has no tokenizer.json")
    _check_json_object(folder / "tokenizer.json")


def weight_files(folder: Path) -> list[Path]:
    """The *.safetensors files of a model folder: those that its index names, or all where it has no index.

    Raises ModelLoadError when there are none, or when one that the index names is missing.
    """
    if not (folder / INDEX_NAME).is_file():
        return _files_without_index(folder)
    weight_map = read_json_object(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{folder / INDEX_NAME} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelLoadError(f"{folder / INDEX_NAME} names a file outside its folder: {name!r}")
    _check_present(folder, names)
    return [folder / name for name in names]


def _files_without_index(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"{folder} has no weights, no *.safetensors{_pickle_hint(folder)}{_gguf_hint(folder)}")
    for file in files:  # "model-00001-of-00003.safetensors" tells how many there are
        if match := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.safetensors", file.name):
            count = int(match[3])
            _check_present(folder, [f"{match[1]}{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)])
    return files


def _check_present(folder: Path, names: list[str]) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelLoadError(f"{folder} is incomplete: of {len(names)} weight files, missing: {', '.join(missing)}")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelLoadError when it cannot be read or is something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def _check_json_object(path: Path) -> None:
    """As `read_json_object`, in a tenth of the time: nothing is made of what is read."""
    try:
        msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise ModelLoadError(f"cannot read {path} as JSON: {error}") from error


def check_safetensors(path: Path) -> None:
    """Raises ModelLoadError unless `path` is a whole safetensors file.

    The format: 8 bytes of header length, the header (JSON), the data. https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
            raise ModelLoadError(f"{path} is no safetensors file, or truncated: {size} bytes, header {header_bytes}")
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        data_bytes = max(ends, default=0)
        expected = 8 + header_bytes + data_bytes
    except (ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        raise ModelLoadError(f"{path} is no safetensors file: its header is damaged ({error!r})") from error
    if size != expected:
        reason = "truncated" if size < expected else "damaged"
        raise ModelLoadError(f"{path} is {reason}: it has {size} bytes, its header describes {expected}")


def _pickle_hint(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if not pickles:
        return ""
    return (
        f". {', '.join(pickles[:3])} would have to be unpickled, which can run any code, so it is not read: "
        "convert the weights to safetensors"
    )


def _inside_hint(folder: Path) -> str:
    folders = " or ".join(map(str, models_inside(folder)))
    return f". Did you mean {folders}?" if folders else ""


def _gguf_hint(folder: Path) -> str:
    files = sorted(str(path) for path in folder.glob("*.gguf"))
    return f". It has GGUF files; pass one of them: {', '.join(files)}" if files else ""
