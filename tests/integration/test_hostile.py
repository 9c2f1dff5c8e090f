"""Peers that send what no client would, and callers that ask for the impossible: all others go on being served."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import socket
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from asyncscale import (
    AsyncScaleClient,
    AsyncScaleError,
    ClientClosedError,
    Completion,
    EngineDeadError,
    Generation,
    InvalidRequestError,
    RequestAbortedError,
    RequestTimeoutError,
    SimulatedModel,
    messages,
)
from asyncscale.client import client as client_module
from asyncscale.params import Sampling

FAST = SimulatedModel(base_ms=0.2, decode_us=1, prefill_us=0.1)
LONG: dict[str, Any] = {"max_tokens": 5000, "ignore_eos": True}
VERSION = messages.PROTOCOL_VERSION
PROMPT = b"\1\0\0\0" * 4


@pytest.fixture
async def client() -> AsyncIterator[AsyncScaleClient]:
    async with AsyncScaleClient(FAST, num_engines=1) as client:
        yield client


@pytest.fixture
def connect(client: AsyncScaleClient, runtime_folders: Path) -> Iterator[Callable[..., zmq.Socket[bytes]]]:
    """Makes raw DEALERs to the engine ("engine-0.0") or the coordinator ("coordinator")."""
    context, sockets = zmq.Context(), []

    def dealer(name: str, identity: bytes | None = None) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.DEALER)
        sockets.append(socket)
        if identity is not None:
            socket.setsockopt(zmq.IDENTITY, identity)
        (folder,) = runtime_folders.glob("asyncscale-*")
        socket.connect(f"ipc://{folder}/{name}")
        return socket

    yield dealer
    for dealer_socket in sockets:
        dealer_socket.close(linger=0)
    context.term()


async def answer(socket: zmq.Socket[bytes], decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    """The next message that the socket receives."""
    assert await asyncio.to_thread(socket.poll, 5000), "no answer within 5 s"
    return decoder.decode(socket.recv())


async def engine_message(socket: zmq.Socket[bytes]) -> messages.FromEngine:
    return await answer(socket, messages.from_engine_decoder)  # type: ignore[no-any-return]


async def assert_serving(client: AsyncScaleClient) -> None:
    async with asyncio.timeout(10):
        assert len((await client.generate("still there?", max_tokens=5, ignore_eos=True)).token_ids) == 5


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


MALFORMED = {
    "empty": b"",
    "noise": bytes(random.Random(1).randbytes(1000)),
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "unknown tag": msgspec.msgpack.encode(["reboot", 1]),
    "no array": msgspec.msgpack.encode({"type": "add"}),
    "truncated": messages.encoder.encode(messages.Add(1, PROMPT, 4, Sampling(5)))[:-5],
    "wrong types": msgspec.msgpack.encode(["add", "one", 2, 3.0, None]),
    "array of 4 billion": b"\x92\xa5abort\xdd\xff\xff\xff\xff",
    "string of 4 GB": b"\x94\xa4call\x00\xdb\xff\xff\xff\xff",
    "other direction": messages.encoder.encode(messages.Farewell()),
    "invalid UTF-8": b"\x94\xa4call\x00\xa1\xff\x90",
    "invalid UTF-8 in the tag": b"\x91\xa1\xff",
    "deep nesting": b"\x94\xa4call\x00\xa1x\x91" + nested(100_000),
    "deep nesting in a surplus field": b"\x92\xaadisconnect" + nested(100_000),
    "deep nesting in the coordinator's surplus field": b"\x92\xa6detach" + nested(100_000),
    "8 MB": b"\xc6" + (8_000_000).to_bytes(4, "big") + bytes(8_000_000),
}


@pytest.mark.parametrize("peer", ["engine-0.0", "coordinator"])
async def test_malformed_messages_are_dropped(
    client: AsyncScaleClient, connect: Callable[..., zmq.Socket[bytes]], peer: str
) -> None:
    for name, frame in MALFORMED.items():
        hostile = connect(peer)
        hostile.send(frame)
        hostile.send_multipart([b"", frame])
        hostile.send_multipart([b"a", b"b", b"c"])
        if peer == "coordinator":
            hostile.send(messages.encoder.encode(messages.Attach(VERSION)))
            assert isinstance(await answer(hostile, messages.from_coordinator_decoder), messages.Welcome), name
        else:
            hostile.send(messages.encoder.encode(messages.Connect(VERSION)))
            assert isinstance(await engine_message(hostile), messages.LoadReport), name
    await assert_serving(client)


def hostile_frames(rng: random.Random) -> Iterator[bytes]:
    """Without end: what clients send and what they do not, whole, mutilated, cut short, grown, of noise, and again."""
    good = [
        messages.encoder.encode(message)
        for message in (
            messages.Connect(VERSION, watch_loads=True),
            messages.Add(1, PROMPT, 4, Sampling(5, logit_bias=((3, 1.0),), stop_token_ids=(7,)), n=3),
            messages.Add(9, PROMPT, 4, Sampling(5, logprobs=3, prompt_logprobs=2, bad_words_token_ids=((1, 2),))),
            messages.Abort([1, 2, 3]),
            messages.Call(1, "kv_cache_stats", []),
            messages.Disconnect(),
            messages.Attach(VERSION),
            messages.CollectiveCall(1, "kv_cache_stats", []),
            messages.Detach(),
        )
    ]
    sent = good.copy()
    while True:
        frame = bytearray(rng.choice(sent if rng.random() < 0.2 else good))
        for _ in range(rng.randrange(4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        match rng.randrange(20):
            case 0 | 1 | 2:
                frame = frame[: rng.randrange(1, len(frame) + 1)]
            case 3:
                frame += rng.randbytes(rng.randrange(100))
            case 4:
                frame = bytearray(rng.randbytes(rng.randrange(1, 100)))
            case 5:
                frame[rng.randrange(len(frame)) :] = rng.choice(good)
        if rng.random() < 0.01:
            sent[rng.randrange(len(sent))] = bytes(frame)
        yield bytes(frame)


def engine_stderr(runtime_folders: Path) -> str:
    (path,) = runtime_folders.glob("asyncscale-*/engine-0.0.stderr")
    return path.read_text()


async def test_a_hundred_thousand_hostile_frames_do_no_harm(
    client: AsyncScaleClient,
    connect: Callable[..., zmq.Socket[bytes]],
    runtime_folders: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = random.Random(7)
    live = client.generate("goes on all the while", max_tokens=8000, ignore_eos=True)
    peers = [connect("engine-0.0"), connect("coordinator"), connect("engine-0.0"), connect("coordinator")]
    for number, frame in zip(range(100_000), hostile_frames(rng), strict=False):
        peer = rng.choice(peers)
        if number % 100:
            peer.send(frame)
        else:
            peer.send_multipart([frame] * rng.randrange(2, 2000))
        if number % 1000 == 0:
            await asyncio.sleep(0)
        if number % 5000 == 0:  # some leave, with what they were sent unread
            index = peers.index(peer)
            peers[index] = connect("coordinator" if index % 2 else "engine-0.0")
            peer.close(linger=-1)
    for peer in peers:
        peer.close(linger=-1)
    assert len((await live).token_ids) == 8000
    await assert_serving(client)
    (info,) = await client.collective_rpc("process_info")
    assert info["num_malformed"] > 1000
    await until(lambda: client.num_malformed > 1000)
    assert engine_stderr(runtime_folders) == ""
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("peer", ["engine-0.0", "coordinator"])
async def test_who_sends_more_than_any_message_holds_is_disconnected(
    client: AsyncScaleClient, connect: Callable[..., zmq.Socket[bytes]], peer: str
) -> None:
    hostile = connect(peer)
    monitor = hostile.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    try:
        hostile.send(bytes(messages.MAX_REQUEST_BYTES - 1000))
        hostile.send(bytes(messages.MAX_REQUEST_BYTES + 100_000))
        assert await asyncio.to_thread(monitor.poll, 10_000)
    finally:
        hostile.disable_monitor()
        monitor.close()
    await assert_serving(client)


SAMPLING = Sampling(5)
ABSURD = {
    "no choices": messages.Add(1, PROMPT, 4, SAMPLING, n=0),
    "negative n": messages.Add(1, PROMPT, 4, SAMPLING, n=-5),
    "too many choices": messages.Add(1, PROMPT, 4, SAMPLING, n=2**63),
    "the largest id": messages.Add(2**64 - 1, PROMPT, 4, SAMPLING),
    "choices beyond the largest id": messages.Add(2**64 - 1, PROMPT, 4, SAMPLING, n=2),
    "negative id": messages.Add(-(2**63), PROMPT, 4, SAMPLING, n=1024),
    "no prompt": messages.Add(1, b"", 0, SAMPLING),
    "part of a token": messages.Add(1, PROMPT[:-1], 4, SAMPLING),
    "negative token": messages.Add(1, b"\xff\xff\xff\xff", 1, SAMPLING),
    "token out of range": messages.Add(1, b"\xff\xff\xff\x7f", 1, SAMPLING),
    "prompt longer than its tokens": messages.Add(1, PROMPT, 5, SAMPLING),
    "negative prompt length": messages.Add(1, PROMPT, -1, SAMPLING),
    "prompt of a million tokens": messages.Add(1, b"\1\0\0\0" * 1_000_000, 1_000_000, SAMPLING),
    "priority beyond 64 bits": messages.Add(1, PROMPT, 4, SAMPLING, priority=2**64 - 1),
    "no tokens wanted": messages.Add(1, PROMPT, 4, Sampling(0)),
    "negative min_tokens": messages.Add(1, PROMPT, 4, Sampling(5, min_tokens=-1)),
    "NaN": messages.Add(1, PROMPT, 4, Sampling(5, temperature=float("nan"))),
    "infinite bias": messages.Add(1, PROMPT, 4, Sampling(5, logit_bias=((1, float("inf")),))),
    "stop token out of range": messages.Add(1, PROMPT, 4, Sampling(5, stop_token_ids=(-1,))),
    "empty bad word": messages.Add(1, PROMPT, 4, Sampling(5, bad_words_token_ids=((),))),
    "too many logprobs": messages.Add(1, PROMPT, 4, Sampling(5, logprobs=2**63)),
}


async def test_absurd_requests_are_answered_with_errors(
    client: AsyncScaleClient, connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    other = client.generate("a live request", **LONG)
    hostile = connect("engine-0.0")
    for name, message in ABSURD.items():
        hostile.send(messages.encoder.encode(message))
        outputs = await engine_message(hostile)
        assert isinstance(outputs, messages.Outputs), name
        assert {finished.reason for finished in outputs.finished} == {"error"}, name
        assert outputs.finished[0].request_id == message.request_id, name
        assert not other.done
    await assert_serving(client)


async def test_extreme_but_legal_values_are_served(
    client: AsyncScaleClient, connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    hostile = connect("engine-0.0")
    extreme = Sampling(
        2**64 - 1,
        min_tokens=2**63 - 1,
        temperature=1e308,
        top_k=2**63 - 1,
        repetition_penalty=1e308,
        presence_penalty=-1e308,
        seed=2**64 - 1,
        stop_token_ids=tuple(range(1000)),
        logit_bias=tuple((token_id, -1e308) for token_id in range(1000)),
        logprobs=1000,
    )
    hostile.send(messages.encoder.encode(messages.Add(2**62, PROMPT, 4, extreme, n=2, priority=2**63 - 1)))
    outputs = await engine_message(hostile)
    assert isinstance(outputs, messages.Outputs)
    assert outputs.request_ids == [2**62]
    assert outputs.finished == []
    await assert_serving(client)


async def test_ids_of_one_client_mean_nothing_from_another(
    client: AsyncScaleClient, connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    """Its live id added, aborted and disconnected under another identity: its request goes on."""
    live = client.generate("live", max_tokens=2000, ignore_eos=True)
    wire_id = live._stream.choices[0].wire_id
    hostile = connect("engine-0.0")
    for message in (
        messages.Add(wire_id, PROMPT, 4, Sampling(5)),
        messages.Abort([wire_id]),
        messages.Disconnect(),
        messages.Disconnect(),
    ):
        hostile.send(messages.encoder.encode(message))
    assert len((await live).token_ids) == 2000


async def test_a_repeated_id_is_refused_and_unknown_ids_are_ignored(
    client: AsyncScaleClient, connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    hostile = connect("engine-0.0")
    hostile.send(messages.encoder.encode(messages.Abort([0, 1, 2**64 - 1, -(2**63)] * 1000)))
    hostile.send(messages.encoder.encode(messages.Add(1, PROMPT, 4, Sampling(5000), n=3)))
    hostile.send(messages.encoder.encode(messages.Add(3, PROMPT, 4, Sampling(5000), n=3)))
    errors: list[int] = []
    while len(errors) < 3:
        outputs = await engine_message(hostile)
        assert isinstance(outputs, messages.Outputs)
        errors += [finished.request_id for finished in outputs.finished]
    assert errors == [3, 4, 5]
    await assert_serving(client)


@pytest.mark.parametrize("peer", ["engine-0.0", "coordinator"])
async def test_a_peer_under_the_identity_of_a_live_client_changes_nothing(
    client: AsyncScaleClient, connect: Callable[..., zmq.Socket[bytes]], peer: str
) -> None:
    async with AsyncScaleClient.attach(client.address) as other:
        live = other.generate("live", max_tokens=2000, ignore_eos=True)
        tokens = aiter(live)
        await anext(tokens)  # an identity is a secret of whoever connects with it first
        engine_connection = other._dispatcher._fleet[0]
        double = connect(peer, other._identity if peer == "coordinator" else engine_connection.identity)
        for _ in range(10):
            double.send(messages.encoder.encode(messages.Disconnect() if peer != "coordinator" else messages.Detach()))
        await asyncio.to_thread(double.poll, 200)
        assert len((await live).token_ids) == 2000
        await assert_serving(other)
        await assert_serving(client)


async def test_peers_that_connect_and_vanish_leave_no_work_behind(
    client: AsyncScaleClient, connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    for number in range(30):
        engine, coordinator = connect("engine-0.0"), connect("coordinator")
        coordinator.send(messages.encoder.encode(messages.Attach(VERSION)))
        engine.send(messages.encoder.encode(messages.Connect(VERSION, watch_loads=True)))
        await engine_message(engine)
        engine.send(messages.encoder.encode(messages.Add(number, PROMPT, 4, Sampling(8000), n=5)))
        await engine_message(engine)
        engine.close(linger=0)
        coordinator.close(linger=0)
    async with asyncio.timeout(10):
        async for (load,) in client.watch_loads():
            if load.running + load.waiting == 0:
                break
    await assert_serving(client)


async def test_a_raw_socket_that_speaks_no_zmtp_is_ignored(client: AsyncScaleClient) -> None:
    for address in (client.address, client.address.replace("coordinator", "engine-0.0")):
        _, writer = await asyncio.open_unix_connection(address.removeprefix("ipc://"))
        writer.write(os.urandom(100_000))
        writer.close()
    await assert_serving(client)


async def test_calls_with_wrong_arguments_or_absurd_ones_are_refused(
    client: AsyncScaleClient, connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    hostile = connect("engine-0.0")
    ext = msgspec.Raw(b"\xc7\x05\x05hello")
    for method, args in [
        ("__class__", []),
        ("x" * 1_000_000, []),
        ("kv_cache_stats", [msgspec.Raw(b"\x01")]),
        ("kv_cache_stats", [ext]),
        ("reset_prefix_cache", [msgspec.Raw(nested(900))]),
    ]:
        hostile.send(messages.encoder.encode(messages.Call(2**64 - 1, method, args)))
        result = await engine_message(hostile)
        assert isinstance(result, messages.CallResult)
        assert result.error
    await assert_serving(client)


async def test_a_client_of_another_protocol_version_is_not_counted_among_the_clients(
    client: AsyncScaleClient, connect: Callable[..., zmq.Socket[bytes]]
) -> None:
    hostile = connect("coordinator")
    hostile.send(messages.encoder.encode(messages.Attach(VERSION + 1)))
    welcome = await answer(hostile, messages.from_coordinator_decoder)
    assert welcome.version == VERSION
    await client.generate("changes the counts", max_tokens=50, ignore_eos=True)
    assert not await asyncio.to_thread(hostile.poll, 50)


# --- callers


async def assert_idle(client: AsyncScaleClient) -> None:
    async with asyncio.timeout(10):
        async for loads in client.watch_loads():
            if all(load.mine == load.running == load.waiting == 0 for load in loads):
                return


@pytest.mark.parametrize(
    "address",
    ["ipc://", "ipc://" + "x" * 200, "ipc://\0", "ipc://nonsense", "ipc:///nowhere/coordinator", "ipc:///etc/passwd"],
    ids=["empty", "too long", "NUL", "relative", "gone", "no socket"],
)
async def test_attaching_to_nonsense_raises_at_once(address: str) -> None:
    async with asyncio.timeout(5):
        with pytest.raises((AsyncScaleError, ValueError)):
            await AsyncScaleClient.attach(address).start()


async def test_attaching_after_the_owner_closed_raises_at_once(runtime_folders: Path) -> None:
    path = runtime_folders / "coordinator"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    async with asyncio.timeout(5):
        with pytest.raises(AsyncScaleError):
            await AsyncScaleClient.attach(f"ipc://{path}").start()


@pytest.mark.parametrize("event", ["the owner closes", "the engine dies"])
async def test_engines_that_leave_while_a_client_attaches_end_its_start(
    monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    async with AsyncScaleClient(FAST, num_engines=1, max_restarts=0) as owner:
        (engine,) = owner._engines.supervisor.engines.values()  # type: ignore[attr-defined]
        entered, release = slow_tokenizer(monkeypatch)
        client = AsyncScaleClient.attach(owner.address)
        start = asyncio.ensure_future(client.start())
        await asyncio.to_thread(entered.wait)
        if event == "the engine dies":
            os.kill(engine.pid, signal.SIGKILL)
        else:
            await owner.close()
        await until(lambda: not client._engines.roster.members)
        release.set()
        with pytest.raises(AsyncScaleError):
            await asyncio.wait_for(start, 5)


@pytest.mark.parametrize("max_restarts", [0, 1])
async def test_an_engine_that_dies_after_it_was_ready_ends_the_start_or_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, max_restarts: int
) -> None:
    entered, release = slow_tokenizer(monkeypatch)
    client = AsyncScaleClient(FAST, num_engines=1, max_restarts=max_restarts)
    start = asyncio.ensure_future(client.start())
    await asyncio.to_thread(entered.wait)
    engines = client._engines.supervisor.engines  # type: ignore[attr-defined]
    await until(lambda: any(engine.facts for engine in engines.values()))
    (engine,) = engines.values()
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: engine not in engines.values())
    release.set()
    if max_restarts:
        await asyncio.wait_for(start, 5)
        await client.generate("hello", max_tokens=3)
        await client.close()
    else:
        with pytest.raises(AsyncScaleError):
            await asyncio.wait_for(start, 5)


async def until(condition: Callable[[], bool]) -> None:
    """For what no event tells of."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def slow_tokenizer(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Makes starting clients wait for their tokenizer: (set when one does, to be set to let it go on)."""
    entered, release, load_codec = threading.Event(), threading.Event(), client_module.load_codec  # type: ignore[attr-defined]

    def load_slowly(source: Any) -> Any:
        entered.set()
        release.wait(20)
        return load_codec(source)

    monkeypatch.setattr(client_module, "load_codec", load_slowly)
    return entered, release


async def test_start_may_be_cancelled_at_any_moment_and_twice() -> None:
    for moment in (0, 0.01, 0.1, 0.2, 0.3):
        for twice in (False, True):
            client = AsyncScaleClient(FAST, num_engines=1)
            task = asyncio.ensure_future(client.start())
            await asyncio.sleep(moment)
            task.cancel()
            if twice:
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await client.close()


async def test_close_may_be_cancelled_at_any_moment() -> None:
    for ticks in (0, 1, 2, 5):
        client = await AsyncScaleClient(FAST, num_engines=1).start()
        generation = client.generate("hello", **LONG)
        task = asyncio.ensure_future(client.close(drain=ticks == 5))
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        generation.abort()
        await client.close(drain=False)
        with pytest.raises(ClientClosedError):
            client.generate("late")


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_tokens": 10**30},
        {"min_tokens": 10**30},
        {"top_k": 10**30},
        {"temperature": 10**400},
        {"timeout": float("nan")},
        {"engine": False},
        {"engine": 0.0},
        {"repetition_penalty": 1e-320},
        {"top_p": 1e-320},
    ],
    ids=str,
)
async def test_absurd_arguments_are_refused_by_the_call(client: AsyncScaleClient, keywords: dict[str, Any]) -> None:
    try:
        with pytest.raises(InvalidRequestError):
            client.generate("hello", **keywords)
    finally:
        assert client.engine_loads()[0].mine == 0


async def test_absurd_arguments_that_mean_something_are_served(client: AsyncScaleClient) -> None:
    absurd: list[dict[str, Any]] = [
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
        {"timeout": 1e6},
        {"stop": ["z" * 10_000_000]},
        {"stop": ["never"] * 10_000},
        {"bad_words": ["x"] * 1000},
        {"logit_bias": dict.fromkeys(range(1000), 1e308)},
        {"request_id": "\ud800", "session": "\udfff"},
        {"logprobs": 1000, "prompt_logprobs": 1000},
    ]
    for keywords in absurd:
        completion = await client.generate("hello", max_tokens=3, ignore_eos=True, **keywords)
        assert len(completion.token_ids) == 3
    assert len((await client.generate("hello", n=1024, max_tokens=2, ignore_eos=True)).choices) == 1024
    assert len((await client.generate("hello", max_tokens=2**31 - 1, ignore_eos=True)).token_ids) == 8192 - 5
    await assert_idle(client)


async def test_ten_thousand_requests_in_one_tick_some_of_them_wrong(client: AsyncScaleClient) -> None:
    async def ask(number: int) -> str:
        return (await client.generate(f"prompt {number}" if number % 10 else "", max_tokens=2)).request_id

    results = await asyncio.gather(*map(ask, range(10_000)), return_exceptions=True)
    assert sum(isinstance(result, InvalidRequestError) for result in results) == 1000
    assert len({result for result in results if isinstance(result, str)}) == 9000
    await assert_idle(client)


async def test_a_thousand_timeouts_at_once_leave_nothing_held_back(client: AsyncScaleClient) -> None:
    generations = [client.generate(f"{i}", timeout=0.02 if i % 2 else 1e-9, **LONG) for i in range(1000)]
    results = await asyncio.gather(*generations, return_exceptions=True)
    assert {type(result) for result in results} == {RequestTimeoutError}
    await assert_idle(client)


@pytest.mark.parametrize("n", [1, 3])
async def test_two_readers_and_two_awaits_see_the_same(client: AsyncScaleClient, n: int) -> None:
    generation = client.generate("hello", n=n, seed=3, max_tokens=50, ignore_eos=True)

    async def read() -> list[tuple[int, str]]:
        return [(token.choice, token.text) async for token in generation]

    async def complete() -> Completion:
        return await generation

    one, other, first, second = await asyncio.gather(read(), read(), complete(), complete())
    assert one == other
    assert first == second == await generation
    assert "".join(text for choice, text in one if choice == 0) == first.text


async def test_text_can_be_read_after_the_client_closed() -> None:
    async with AsyncScaleClient(FAST, num_engines=1) as client:
        generation = client.generate("hello", seed=1, max_tokens=20, ignore_eos=True)
        tokens = [token async for token in generation]
    assert "".join(map(str, tokens)) == (await generation).text


async def test_aborting_while_reading_ends_the_loop_with_its_error(client: AsyncScaleClient) -> None:
    generation = client.generate("hello", **LONG)

    async def read() -> None:
        async for _ in generation:
            generation.abort()

    with pytest.raises(RequestAbortedError):
        await read()
    await assert_idle(client)


async def test_generate_from_a_plain_callback(client: AsyncScaleClient) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Generation] = loop.create_future()
    loop.call_soon(lambda: future.set_result(client.generate("hello", max_tokens=3, ignore_eos=True)))
    assert len((await (await future)).token_ids) == 3


async def test_generate_while_closing_is_refused_and_harms_nothing() -> None:
    client = await AsyncScaleClient(FAST, num_engines=1).start()
    generations = [client.generate("hello", max_tokens=50, ignore_eos=True) for _ in range(100)]
    closing = asyncio.gather(client.close(), client.close(), client.close(timeout=0))
    while not closing.done():
        await asyncio.sleep(0)
        with pytest.raises(ClientClosedError):
            client.generate("late")
    assert {len(completion.token_ids) for completion in await asyncio.gather(*generations)} == {50}


async def test_a_call_whose_arguments_cannot_be_sent_leaves_nothing(client: AsyncScaleClient) -> None:
    with pytest.raises(TypeError):
        await client.collective_rpc("kv_cache_stats", object())
    assert client._dispatcher._fleet[0]._calls == {}


async def test_waits_for_loads_that_are_cancelled_leave_nothing(client: AsyncScaleClient) -> None:
    await assert_idle(client)
    watch = client.watch_loads()
    await anext(watch)
    task = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not client._dispatcher._load_waiters


async def test_an_idle_client_and_its_engines_use_no_cpu(client: AsyncScaleClient) -> None:
    await client.generate("hello", max_tokens=5)
    (engine,) = client._engines.supervisor.engines.values()  # type: ignore[attr-defined]
    processes = [psutil.Process(), psutil.Process(engine.pid)]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    await asyncio.sleep(2)
    after = [sum(process.cpu_times()[:2]) for process in processes]
    assert all(end - start <= 0.1 for start, end in zip(before, after, strict=True))


async def test_memory_does_not_grow_with_the_number_of_requests() -> None:
    # A small vocabulary, so that the table of tokens' texts is soon complete.
    model = SimulatedModel(base_ms=0.2, decode_us=1, prefill_us=0.1, vocab_size=300)
    async with AsyncScaleClient(model, num_engines=1) as client:
        (engine,) = client._engines.supervisor.engines.values()  # type: ignore[attr-defined]

        async def ask(count: int) -> int:
            for _ in range(count // 500):
                await asyncio.gather(*(client.generate("hello", max_tokens=2) for _ in range(500)))
            gc.collect()
            return psutil.Process(engine.pid).memory_info().rss

        engine_before = await ask(2000)
        tracemalloc.start()
        try:
            await ask(1000)
            before, _ = tracemalloc.get_traced_memory()
            await ask(4000)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 50_000
        assert await ask(10_000) - engine_before < 4_000_000


async def test_errors_after_all_engines_died_do_not_grow() -> None:
    async with AsyncScaleClient(FAST, num_engines=1, max_restarts=0) as client:
        (engine,) = client._engines.supervisor.engines.values()  # type: ignore[attr-defined]
        os.kill(engine.pid, signal.SIGKILL)
        async for loads in client.watch_loads():
            if not loads:
                break
        lengths = []
        for _ in range(10):
            with pytest.raises(EngineDeadError) as caught:
                client.generate("hello")
            lengths.append(len(caught.traceback))
        assert len(set(lengths)) == 1
