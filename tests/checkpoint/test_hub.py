from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncscale.checkpoint.resolve import resolve_model
from asyncscale.errors import ModelLoadError


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port where nobody answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_folder_model_is_fetched_without_files_that_are_not_needed(hub: Any, folder_files: dict[str, bytes]) -> None:
    hub.repositories["org/name"] = {**folder_files, "pytorch_model.bin": b"pickle", "README.md": b"text"}
    files = resolve_model("org/name")
    assert (files.format, files.name) == ("safetensors", "org/name")
    found = {path.name: path.read_bytes() for path in Path(files.path).iterdir()}
    assert found == folder_files


def test_the_second_time_no_file_is_fetched_again(hub: Any, folder_files: dict[str, bytes]) -> None:
    hub.repositories["org/name"] = folder_files
    first = resolve_model("org/name")
    hub.asked.clear()
    assert resolve_model("org/name") == first
    assert [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line] == []


def test_a_revision_is_honoured(hub: Any, folder_files: dict[str, bytes]) -> None:
    hub.repositories["org/name"] = folder_files
    commit = hub.commit("org/name")
    assert Path(resolve_model(f"org/name@{commit}").path).name == commit
    with pytest.raises(ModelLoadError, match="no revision 'v9'"):
        resolve_model("org/name@v9")


def test_the_only_gguf_file_is_taken(hub: Any, gguf_path: Path) -> None:
    hub.repositories["org/name"] = {"README.md": b"", "config.json": b"{}", "model.gguf": gguf_path.read_bytes()}
    files = resolve_model("org/name")
    assert files.format == "gguf"
    assert Path(files.path).read_bytes() == gguf_path.read_bytes()


def test_of_several_gguf_files_one_must_be_picked(hub: Any, gguf_path: Path) -> None:
    hub.repositories["org/name"] = {"a.gguf": b"", "b.gguf": gguf_path.read_bytes()}
    with pytest.raises(ModelLoadError, match=r"pick one of:\n  org/name:a.gguf\n  org/name:b.gguf"):
        resolve_model("org/name")
    assert Path(resolve_model("org/name:b.gguf").path).name == "b.gguf"
    with pytest.raises(ModelLoadError, match=r"no file c.gguf; its GGUF files: a.gguf, b.gguf"):
        resolve_model("org/name:c.gguf")


def test_pickled_weights_are_refused(hub: Any) -> None:
    hub.repositories["org/name"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(ModelLoadError, match=r"neither .*safetensors nor .*gguf.*pickle"):
        resolve_model("org/name")


def test_a_repository_that_does_not_exist_is_named(hub: Any) -> None:
    with pytest.raises(ModelLoadError, match="has no model org/nothing"):
        resolve_model("org/nothing")


def test_a_gated_repository_says_how_to_get_in(hub: Any, folder_files: dict[str, bytes]) -> None:
    hub.repositories["org/name"] = folder_files
    hub.gated.add("org/name")
    with pytest.raises(ModelLoadError, match=r"gated.*HF_TOKEN"):
        resolve_model("org/name")


def test_progress_counts_the_bytes_that_are_missing(hub: Any, folder_files: dict[str, bytes]) -> None:
    hub.repositories["org/name"] = folder_files
    calls: list[tuple[str, int, int | None]] = []
    resolve_model("org/name", lambda *call: calls.append(call))
    assert calls[0][0].startswith("asking http://127.0.0.1")
    assert calls[-1] == (
        "fetching org/name",
        sum(map(len, folder_files.values())),
        sum(map(len, folder_files.values())),
    )


def test_switched_off_a_complete_snapshot_is_used(
    hub: Any, folder_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/name"] = folder_files
    online = resolve_model("org/name")
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model("org/name") == online
    assert hub.asked == []
    with pytest.raises(ModelLoadError, match=r"org/other is not complete in the cache .*HF_HUB_OFFLINE is set"):
        resolve_model("org/other")


@pytest.mark.parametrize("port", ["dead_port", "silent_port"])
def test_a_hub_that_does_not_answer_is_given_up(
    port: str,
    hub: Any,
    folder_files: dict[str, bytes],
    gguf_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr("asyncscale.checkpoint.hub.ANSWER_TIMEOUT_S", 0.5)
    hub.repositories["org/folder"] = folder_files
    hub.repositories["org/gguf"] = {"config.json": b"{}", "model.gguf": gguf_path.read_bytes()}
    online = [resolve_model("org/folder"), resolve_model("org/gguf")]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{request.getfixturevalue(port)}")
    assert [resolve_model("org/folder"), resolve_model("org/gguf")] == online
    with pytest.raises(ModelLoadError, match=r"org/other is not complete in the cache .* cannot be reached"):
        resolve_model("org/other")


def test_an_incomplete_snapshot_is_not_used_when_the_hub_is_away(
    hub: Any, folder_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/name"] = folder_files
    folder = Path(resolve_model("org/name").path)
    (folder / "tokenizer.json").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match=r"not complete|tokenizer.json"):
        resolve_model("org/name")
