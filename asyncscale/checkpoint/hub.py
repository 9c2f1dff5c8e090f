"""Models of the Hugging Face hub, through huggingface_hub and its own cache.

The environment (HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, HF_HUB_CACHE) is read at each call; huggingface_hub itself reads
it only once, when it is imported.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import msgspec

from asyncscale.checkpoint.progress import Progress
from asyncscale.errors import ModelLoadError

ANSWER_TIMEOUT_S = 5.0  # a hub that has not answered by then is taken as unreachable
_POLL_S = 0.1
_SAFETENSORS_PATTERNS = [
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
]  # fmt: skip
_GGUF_PATTERNS = ["*.gguf"]


class HubModel(msgspec.Struct, frozen=True):
    """What of the hub is meant. file: one GGUF file of the repository, None where it is not said which."""

    repo_id: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubModel | None:
        """From "org/name", "org/name@revision", "org/name:file.gguf"; None when `name` does not look like that."""
        match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([^:\s]+))?(?::([^:\s]+\.gguf))?", name, re.ASCII)
        if match is None or match[1].endswith((".gguf", ".safetensors")):
            return None
        if not all(_stays_inside(part) for part in match.groups() if part is not None):
            return None  # huggingface_hub makes file names of them
        return cls(match[1], match[2], match[3])


def _stays_inside(path: str) -> bool:
    """Whether a relative path leads nowhere but down, and holds only what names hold."""
    plain = re.fullmatch(r"[\w.+ =~-]+(/[\w.+ =~-]+)*", path)
    return plain is not None and not {".", ".."} & set(path.split("/"))


def fetch_from_hub(model: HubModel, progress: Progress) -> Path:
    """The model's folder, or its GGUF file, in huggingface_hub's cache; missing files are downloaded.

    When the hub is switched off (HF_HUB_OFFLINE) or does not answer within seconds, a complete snapshot in the cache is
    used. Raises ModelLoadError with the reason.
    """
    if _is_true("HF_HUB_OFFLINE") or _is_true("TRANSFORMERS_OFFLINE"):
        return _from_cache(model, "HF_HUB_OFFLINE is set")
    progress(f"asking {_endpoint()} for {model.repo_id}", 0, None)
    files, unreachable = _list_files(model)
    if unreachable:
        return _from_cache(model, f"{_endpoint()} cannot be reached: {unreachable}")
    patterns = _wanted(model, list(files))
    with _reported(model, files, patterns, progress):
        return _pick(model, _snapshot(model, patterns, local_files_only=False))


def _list_files(model: HubModel) -> tuple[dict[str, int], str]:
    """The repository's files and their sizes in bytes; or why the hub cannot be asked."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint(), library_name="asyncscale")
    try:
        info = api.model_info(model.repo_id, revision=model.revision, timeout=ANSWER_TIMEOUT_S, files_metadata=True)
    except Exception as error:  # connection errors: their classes belong to the HTTP library that huggingface_hub uses
        if refusal := _refusal(model, error):
            raise ModelLoadError(refusal) from error
        return {}, repr(error)
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}, ""


def _refusal(model: HubModel, error: Exception) -> str:
    """What the hub's answer means, when it did answer; else nothing."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case GatedRepoError():
            return f"{model.repo_id} is gated: accept its terms at {_endpoint()}/{model.repo_id} and set HF_TOKEN"
        case RepositoryNotFoundError():
            return f"{_endpoint()} has no model {model.repo_id} (a private one needs HF_TOKEN), and no such path exists"
        case RevisionNotFoundError():
            return f"{model.repo_id} has no revision {model.revision!r}"
        case HFValidationError():
            return f"{model.repo_id!r} is no hub id: {error}"
    return ""


def _wanted(model: HubModel, files: list[str]) -> list[str]:
    """The patterns of the files to fetch."""
    gguf_files = [name for name in files if name.endswith(".gguf")]
    if model.file is not None:
        if model.file not in files:
            raise ModelLoadError(f"{model.repo_id} has no file {model.file}; its GGUF files: {', '.join(gguf_files)}")
        return [model.file]
    if any(name.endswith(".safetensors") for name in files):
        return _SAFETENSORS_PATTERNS
    if not gguf_files:
        raise ModelLoadError(
            f"{model.repo_id} has neither *.safetensors nor *.gguf files (weights in pickles are not read: "
            "unpickling can run any code)"
        )
    if len(gguf_files) > 1:
        choices = "".join(f"\n  {model.repo_id}:{name}" for name in gguf_files)
        raise ModelLoadError(f"{model.repo_id} has several GGUF files; pick one of:{choices}")
    return gguf_files


def _from_cache(model: HubModel, reason: str) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    for patterns in [[model.file]] if model.file else [_SAFETENSORS_PATTERNS, _GGUF_PATTERNS]:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = _snapshot(model, patterns, local_files_only=True)
            if any(folder.glob("*.safetensors")) or any(folder.rglob("*.gguf")):
                return _pick(model, folder)
    raise ModelLoadError(f"{model.repo_id} is not complete in the cache {_hub_cache()}, and {reason}")


def _pick(model: HubModel, folder: Path) -> Path:
    if model.file is not None:
        return folder / model.file
    gguf_files = sorted(folder.rglob("*.gguf"))
    if any(folder.glob("*.safetensors")) or len(gguf_files) != 1:
        return folder
    return gguf_files[0]


def _snapshot(model: HubModel, patterns: list[str], *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model.repo_id,
                revision=model.revision,
                cache_dir=_hub_cache(),
                endpoint=_endpoint(),
                etag_timeout=ANSWER_TIMEOUT_S,
                allow_patterns=patterns,
                local_files_only=local_files_only,
            )
        )
    except Exception as error:  # of many classes: the HTTP library's, the file system's, huggingface_hub's
        if local_files_only and isinstance(error, LocalEntryNotFoundError):
            raise
        reason = _refusal(model, error) or f"fetching {model.repo_id} from {_endpoint()} failed: {error!r}"
        raise ModelLoadError(reason) from error


@contextlib.contextmanager
def _reported(model: HubModel, files: Mapping[str, int], patterns: list[str], progress: Progress) -> Iterator[None]:
    """Report the growth of the repository's folder in the cache meanwhile, in place of huggingface_hub's own bars."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    total = sum(size for name, size in files.items() if any(fnmatch(name, pattern) for pattern in patterns))
    blobs = _hub_cache() / f"models--{model.repo_id.replace('/', '--')}" / "blobs"
    before, finished = _folder_bytes(blobs), threading.Event()

    def report() -> None:
        over = False
        while not over:
            over = finished.wait(_POLL_S)
            if (grown := _folder_bytes(blobs) - before) > 0:
                progress(f"fetching {model.repo_id}", min(grown, total), total)

    own_bars = not are_progress_bars_disabled() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    thread = threading.Thread(target=report, name="asyncscale-hub-progress", daemon=True)
    if own_bars:
        disable_progress_bars()
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        if own_bars:
            enable_progress_bars()


def _folder_bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # renamed when it was complete
                total += entry.stat().st_size
    return total


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _hub_cache() -> Path:
    """https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables"""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := os.environ.get(name):
            return Path(folder).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface" / "hub"


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
