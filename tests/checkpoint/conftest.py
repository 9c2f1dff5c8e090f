"""A small server that answers as the Hugging Face hub does, and model files to serve or to damage."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import gguf
import numpy as np
import pytest


class FakeHub:
    """Serves `repositories`: id -> file name -> content; `gated` ones show their listing only."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def commit(self, repo_id: str) -> str:
        return hashlib.sha1(repr(sorted(self.repositories[repo_id].items())).encode()).hexdigest()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None: ...

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
                if parts[:2] == ["api", "models"]:
                    self._api("/".join(parts[2:4]), parts[4:])
                elif parts[2:3] == ["resolve"]:
                    self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
                else:
                    self._answer(404, b"")

            def _api(self, repo_id: str, rest: list[str]) -> None:
                if not self._exists(repo_id, rest[1] if len(rest) > 1 else "main"):
                    return
                files = hub.repositories[repo_id]
                if rest[:1] == ["tree"]:
                    listing = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()]
                    self._answer(200, json.dumps(listing).encode())
                else:
                    siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                    info = {"id": repo_id, "sha": hub.commit(repo_id), "siblings": siblings}
                    self._answer(200, json.dumps(info).encode())

            def _resolve(self, repo_id: str, revision: str, name: str) -> None:
                if not self._exists(repo_id, revision):
                    return
                if repo_id in hub.gated:
                    self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
                elif name not in hub.repositories[repo_id]:
                    self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                else:
                    content = hub.repositories[repo_id][name]
                    headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": hub.commit(repo_id)}
                    self._answer(200, content, headers)

            def _exists(self, repo_id: str, revision: str) -> bool:
                if repo_id not in hub.repositories:
                    self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
                elif revision not in ("main", hub.commit(repo_id)):
                    self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                else:
                    return True
                return False

            def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                total, wanted = len(content), self.headers.get("Range")
                if status == 200 and wanted:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    end = int(last) + 1 if last else total
                    content, status = content[int(first) : end], 206
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                if status == 206:
                    self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{total}")
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

        return Handler


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fake hub that the environment points to, with an empty cache of its own."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    hub = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    yield hub
    hub.close()


def safetensors_bytes(**tensors: np.ndarray) -> bytes:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(tensor.tobytes() for tensor in tensors.values())


@pytest.fixture(scope="session")
def folder_files() -> dict[str, bytes]:
    """A model folder that is whole as far as its files go: file name -> content."""
    return {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "tokenizer.json": b'{"model": {"type": "BPE"}}',
        "model.safetensors": safetensors_bytes(weight=np.arange(6, dtype=np.float32)),
    }


@pytest.fixture
def model_folder(tmp_path: Path, folder_files: dict[str, bytes]) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in folder_files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    """A small GGUF file: metadata of every kind, tensors of several types."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.uint8", 200)
    writer.add_int8("a.int8", -5)
    writer.add_uint16("a.uint16", 60_000)
    writer.add_int16("a.int16", -30_000)
    writer.add_uint32("a.uint32", 4_000_000_000)
    writer.add_int32("a.int32", -2_000_000_000)
    writer.add_uint64("a.uint64", 2**63)
    writer.add_int64("a.int64", -(2**62))
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["é", "bc", "\u2581d"])
    values = np.linspace(-2, 2, 4 * 256, dtype=np.float32).reshape(4, 256)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(kind, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
