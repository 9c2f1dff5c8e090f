"""What a new user does wrong before there is a client, or over the life of a program, and what he is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import run, script

from asyncscale import AsyncScaleClient, ClientStateError, SimulatedModel, blocking
from asyncscale.config import EngineConfig

FAST = SimulatedModel(base_ms=0.2)
KINDS = [AsyncScaleClient, blocking.AsyncScaleClient]


def test_a_second_asyncio_run(workspace: Path) -> None:
    body = """
client = AsyncScaleClient(FAST, num_engines=1)
async def first():
    await client.start()
    return client.generate("x", max_tokens=5000, ignore_eos=True)
async def second(what):
    try:
        await what()
    except ClientStateError as error:
        print(error)
generation = asyncio.run(first())
asyncio.run(second(lambda: client.generate("x")))
async def read():
    await generation
asyncio.run(second(read))
asyncio.run(client.close())
"""
    done = run(script(workspace, body))
    told = "was started on an event loop that is closed: each asyncio.run has its own. Make the client and use it in"
    for line, what in zip(done.stdout.splitlines(), ("this client", "request 'request-0'"), strict=True):
        assert line.startswith(f"{what} {told}")
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_forgotten_close_names_where_the_client_was_made(workspace: Path) -> None:
    body = """
import warnings
warnings.simplefilter("always", ResourceWarning)
async def forget():
    client = await AsyncScaleClient(FAST, num_engines=1).start()
async def main():
    await forget()
asyncio.run(main())
from asyncscale import blocking
client = blocking.AsyncScaleClient(FAST, num_engines=1).start()
del client
"""
    path = script(workspace, body)
    lines = Path(path).read_text().splitlines()
    warned = [line for line in run(path).stderr.splitlines() if "unclosed client" in line]
    made = [1 + next(i for i, line in enumerate(lines) if call in line) for call in (" await Async", "blocking.A")]
    for line, number, cure in zip(warned, made, ("`async with`", "`with`"), strict=True):
        assert f"made at {path}:{number}: use {cure}" in line


def test_use_without_an_event_loop_names_the_blocking_client() -> None:
    with pytest.raises(ClientStateError, match=r"not started.*asyncscale\.blocking"):
        AsyncScaleClient(FAST).generate("x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("nun_engines", "did you mean 'num_engines'"),
        ("max_num_seq", "did you mean 'max_num_seqs'"),
        ("data_parallel_size", "did you mean 'num_engines'"),
        ("gpu_memory_utilization", "did you mean 'kv_cache_memory_fraction'"),
        ("temperature", "pass it to generate"),
        ("xyz", "known are num_engines, "),
    ],
)
def test_options_of_a_client(kind: Callable[..., object], option: str, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        kind(FAST, **{option: 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "fp16"}, "dtype must be 'auto' or 'float32' or 'bfloat16' or 'float16', got 'fp16'"),
        ({"quantization": 4}, "quantization must be 'int8' or None, got 4"),
        ({"max_model_len": "1k"}, "max_model_len must be an integer or None, got '1k'"),
        ({"pin_engines": "no"}, "pin_engines must be True or False, got 'no'"),
        ({"kv_cache_memory_fraction": 2}, "kv_cache_memory_fraction must be in (0, 1], got 2.0"),
        ({"num_engines": "2"}, "num_engines must be \"auto\" or an integer of at least 1, got '2'"),
        ({"max_restarts": -1}, "max_restarts must be an integer of at least 0, got -1"),
        ({"start_timeout": "1 min"}, "start_timeout must be a number of seconds of at least 0, got '1 min'"),
        ({"hang_timeout": -1}, "hang_timeout must be None or a number of seconds of at least 0, got -1"),
        ({"max_queued_requests": 0.5}, "max_queued_requests must be None or an integer of at least 0, got 0.5"),
        ({"routing": "leastloaded"}, "got 'leastloaded'; did you mean 'least-loaded'?"),
    ],
)
def test_values_of_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        AsyncScaleClient(FAST, **options)


@pytest.mark.parametrize("option", EngineConfig.__struct_fields__)
def test_every_option_says_what_it_may_be(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option} must be (an|a|True|'|None).*, got \[\]"):
        AsyncScaleClient(FAST, **{option: []})


KEY = "0123456789abcdef" * 4


@pytest.mark.parametrize("kind", KINDS)
def test_an_address_in_place_of_a_model_or_broken_shows_no_key(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"use AsyncScaleClient\.attach") as made:
        kind(f"tcp://10.0.0.1:5000/?key={KEY}")
    with pytest.raises(ValueError, match="address must be") as attached:
        kind.attach(f"tcp://10.0.0.1/?key={KEY}")
    assert KEY[:16] not in str(made.value) + str(attached.value)
