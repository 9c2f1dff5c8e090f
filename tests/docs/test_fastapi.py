"""The FastAPI recipe as real processes: an owner with engines, two uvicorn workers, and httpx in front of them."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from leftovers import wait_until
from pages import DOCS, program_environment, save_files

MODEL = '"smollm2-135m-instruct", num_engines=2'
SLOW_MODEL = "__import__('asyncscale').SimulatedModel(base_ms=20, mean_output_tokens=10**9)"

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


@pytest.fixture
def serve(workspace: Path) -> Serve:
    """Starts the recipe's serve.py, and looks that it ends well when it is told to. options: those of the owner."""

    @contextlib.contextmanager
    def start(options: str | None = None, max_queued_requests: int = 100) -> Iterator[httpx.Client]:
        save_files(DOCS / "recipes" / "fastapi.md", workspace)
        if options is not None:
            replace(workspace / "serve.py", MODEL, options)
        replace(workspace / "app.py", "max_queued_requests=100", f"max_queued_requests={max_queued_requests}")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        environment = program_environment() | {"PORT": str(port)}
        with (
            (workspace / "log").open("wb") as log,
            subprocess.Popen([sys.executable, "serve.py"], cwd=workspace, env=environment, stderr=log) as program,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
        ):
            try:
                wait_until(lambda: program.poll() is not None or answers(http), "the service answers", 40)
                yield http
            finally:
                program.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.wait(20)
                program.kill()
        text = (workspace / "log").read_text()
        assert program.returncode == 0, text
        assert "Traceback" not in text, text

    return start


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def answers(http: httpx.Client) -> bool:
    with contextlib.suppress(httpx.ConnectError):
        return http.get("/health").is_success
    return False


def in_flight(http: httpx.Client) -> int:
    return sum(engine["in_flight"] for engine in http.get("/health").json().values())


def num_generated(http: httpx.Client) -> float:
    counts = re.findall(r"^asyncscale:generation_tokens_total.* (\S+)$", http.get("/metrics/").text, re.MULTILINE)
    return sum(map(float, counts))


def events(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))["text"]


def test_two_workers_stream_from_shared_engines(serve: Serve) -> None:
    question = {"prompt": "The capital of France is", "max_tokens": 12}
    with serve() as http:
        whole = http.post("/generate", json=question).json()
        assert "Paris" in whole["text"]
        with http.stream("POST", "/generate", json=question | {"stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = list(response.iter_lines())
        assert "".join(events(iter(lines))) == whole["text"]
        assert lines[-2:] == ["data: [DONE]", ""]

        wrong = http.post("/generate", json=question | {"max_tokens": 0})
        assert wrong.status_code == 400
        assert "max_tokens" in wrong.json()["detail"]

        wait_until(lambda: num_generated(http) >= 24, "a scrape shows the tokens of both requests")

        workers = [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) >= 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_disconnects_frees_its_slot(serve: Serve, stream: bool) -> None:
    endless = {"prompt": "Once", "max_tokens": 8000, "temperature": 1, "stream": stream}
    with serve(f"{SLOW_MODEL}, num_engines=1") as http:
        if stream:
            with http.stream("POST", "/generate", json=endless) as response:
                tokens = events(response.iter_lines())  # httpx closes the connection when nobody refers to this
                assert next(tokens)
                wait_until(lambda: in_flight(http) == 1, "the other worker knows of it")
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/generate", json=endless, timeout=0.5)
        wait_until(lambda: in_flight(http) == 0, "the engine has no request")


def test_a_full_service_says_when_to_come_again(serve: Serve) -> None:
    endless = {"prompt": "Once", "max_tokens": 8000, "temperature": 1, "stream": True}
    options = f"{SLOW_MODEL}, num_engines=1, max_num_seqs=2"
    with serve(options, max_queued_requests=1) as http:
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                response = stack.enter_context(http.stream("POST", "/generate", json=endless))
                if response.status_code != 200:
                    break
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            wait_until(lambda: in_flight(http) >= 2, "the other worker knows of it")
        wait_until(lambda: in_flight(http) == 0, "the engine has no request")
        assert http.post("/generate", json=endless | {"max_tokens": 2, "stream": False}).status_code == 200
