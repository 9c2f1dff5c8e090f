"""Models on local disk near a path that leads to none."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from asyncscale.suggestions import closest

_MAX_ENTRIES = 1000  # of a folder: this looks, it does not search
_MAX_OFFERED = 3


def closest_model(path: Path) -> Path | None:
    """A folder or GGUF file that exists, each part of whose path is that of `path` or looks much like it."""
    found = Path(path.anchor)
    try:
        for part in path.parts[1:] if path.anchor else path.parts:
            name: str | None = part
            if not (found / part).exists():
                name = closest(part, _entries(found))
            if name is None:
                return None
            found /= name
        return found if _is_model(found) else None
    except (OSError, ValueError):  # a folder that may not be read, a name that can be none
        return None


def models_inside(folder: Path) -> list[Path]:
    """Some model folders inside of one that is none, such as the snapshots of a repository in the hub's cache."""
    configs = itertools.chain(folder.glob("*/config.json"), folder.glob("snapshots/*/config.json"))
    return sorted(config.parent for config in itertools.islice(configs, _MAX_OFFERED))


def _entries(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [entry.name for entry in itertools.islice(entries, _MAX_ENTRIES)]


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return (path / "config.json").exists() or any(path.glob("*.gguf"))
    return path.suffix.lower() == ".gguf"
