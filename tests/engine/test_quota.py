"""What clients may leave with an engine: beyond it they are told so, and what ends makes room again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from asyncscale import SimulatedModel, messages
from asyncscale.config import EngineConfig
from asyncscale.engine import quota
from asyncscale.engine.core import EngineCore
from asyncscale.model.simulation import SimulatedRunner
from asyncscale.params import Sampling

PROMPT = b"\1\0\0\0" * 100


@pytest.fixture
def core() -> EngineCore:
    model, config = SimulatedModel(base_ms=0, decode_us=0, prefill_us=0), EngineConfig(max_num_seqs=4)
    return EngineCore(SimulatedRunner(model, config), config)


def add(request_id: int, n: int = 1, **sampling: Any) -> messages.Add:
    return messages.Add(request_id, PROMPT, 100, Sampling(5, **sampling), n)


def errors(core: EngineCore, client: bytes) -> list[str]:
    """What the engine refused since it was last asked."""
    core.pause()
    made = core.step()
    core.resume()
    return [str(finished.error) for finished in made[client].finished] if client in made else []


@pytest.mark.parametrize("whose", ["one client", "all together"])
def test_beyond_the_number_of_requests_an_add_is_refused_until_one_ends(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    monkeypatch.setattr(quota, "MAX_REQUESTS_PER_CLIENT" if whose == "one client" else "MAX_REQUESTS", 5)
    core.add(b"a" if whose == "one client" else b"b", add(1, n=3))
    core.add(b"a", add(10, n=2))
    assert errors(core, b"a") == []
    core.add(b"a", add(20))
    (error,) = errors(core, b"a")
    assert "too many requests" in error
    core.abort(b"a", [10])
    core.add(b"a", add(30))
    assert errors(core, b"a") == []


@pytest.mark.parametrize(
    "make",
    [
        lambda request_id: msgspec.structs.replace(add(request_id), token_ids=PROMPT * 10),
        lambda request_id: add(request_id, logit_bias=((1, 1.0),) * 100),
        lambda request_id: add(request_id, stop_token_ids=(1,) * 100),
        lambda request_id: add(request_id, bad_words_token_ids=((1,) * 100,)),
    ],
    ids=["tokens", "biases", "stop tokens", "bad words"],
)
def test_whatever_takes_memory_counts(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, make: Callable[[int], messages.Add]
) -> None:
    monkeypatch.setattr(quota, "MAX_BYTES", 6000)
    core.add(b"a", add(1))
    core.add(b"a", add(2))
    assert errors(core, b"a") == []
    core.drop_client(b"a")
    core.add(b"a", make(3))
    (error,) = errors(core, b"a") or ["nothing was refused"]
    assert "too much memory" in error


def test_the_count_returns_to_zero_whatever_way_requests_end(core: EngineCore) -> None:
    for client in (b"a", b"b", b"c"):
        core.add(client, add(1, n=3, logit_bias=((1, 1.0),)))
        core.add(client, add(1))  # refused: the id is in use
    core.abort(b"a", [1, 2, 3, 99])
    core.drop_client(b"b")
    while core.has_work:
        core.step()
    count = core._quota
    assert (count._all_requests, count._all_bytes, count._num_requests, count._num_bytes) == (0, 0, {}, {})
