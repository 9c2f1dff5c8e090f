"""Engines over tcp: everything as on one host, for those who have the address and for nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from asyncscale import AsyncScaleClient, AsyncScaleError, EngineDeadError, SimulatedModel, messages, run_frontends
from asyncscale.address import parse
from asyncscale.testing import kill_engine

HERE = "127.0.0.1"
FAST = SimulatedModel(base_ms=0.2, decode_us=1, prefill_us=0.1)
TEN: dict[str, Any] = {"max_tokens": 10, "ignore_eos": True}


@pytest.fixture
async def client() -> AsyncIterator[AsyncScaleClient]:
    async with AsyncScaleClient(FAST, num_engines=2, host=HERE) as client:
        yield client


def key_of(address: str) -> str:
    return address.rpartition("=")[2]


def addresses(client: AsyncScaleClient) -> list[str]:
    """The coordinator's and every engine's."""
    return [client.address, *(member.address for member in client._engines.roster.members)]


async def assert_serving(client: AsyncScaleClient) -> None:
    async with asyncio.timeout(20):
        for engine in (0, 1):
            assert len((await client.generate("still there?", engine=engine, **TEN)).token_ids) == 10
        async with AsyncScaleClient.attach(client.address) as other:
            assert len((await other.generate("and new ones?", **TEN)).token_ids) == 10


# --- as on one host


async def test_owner_and_attached_clients_generate_the_same_as_over_ipc(client: AsyncScaleClient) -> None:
    async with AsyncScaleClient(FAST, num_engines=1) as on_one_host:
        expected = (await on_one_host.generate("the same", seed=3, temperature=1.0, **TEN)).token_ids
    async with AsyncScaleClient.attach(client.address) as other:
        for somebody in (client, other):
            for engine in (0, 1):
                completion = await somebody.generate("the same", engine=engine, seed=3, temperature=1.0, **TEN)
                assert completion.token_ids == expected
            assert len({info["pid"] for info in await somebody.collective_rpc("process_info")}) == 2


async def test_front_ends_attach_over_tcp(client: AsyncScaleClient) -> None:
    async def main(client: AsyncScaleClient, index: int) -> int:
        return index + len((await client.generate("hello", max_tokens=10, ignore_eos=True)).token_ids)

    assert await run_frontends(main, 2, client.address) == [10, 11]


async def test_requests_of_a_killed_engine_go_on_and_it_comes_back_at_another_port(client: AsyncScaleClient) -> None:
    async with AsyncScaleClient.attach(client.address) as other:
        before = addresses(client)[1]
        generation = other.generate("goes on", engine=0, max_tokens=3000, ignore_eos=True)
        tokens = aiter(generation)
        await anext(tokens)
        await kill_engine(client, 0)
        assert len((await asyncio.wait_for(generation, 30)).token_ids) == 3000
        assert addresses(client)[1] != before
        assert [health.restarts for health in client.health()] == [1, 0]


OWNER = """
import asyncio, sys
from asyncscale import AsyncScaleClient, SimulatedModel

async def main():
    async with AsyncScaleClient(SimulatedModel(), num_engines=2, host="127.0.0.1") as client:
        print(client.address, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_when_the_owner_is_killed_attached_clients_know_at_once() -> None:
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, stdout=asyncio.subprocess.PIPE)
    try:
        assert owner.stdout is not None
        address = (await owner.stdout.readline()).decode().strip()
        command_lines = [Path(f"/proc/{pid}/cmdline") for pid in (owner.pid, *children_of(owner.pid))]
        assert not any(key_of(address).encode() in path.read_bytes() for path in command_lines)
        async with AsyncScaleClient.attach(address) as client:
            generation = client.generate("for ever", max_tokens=5000, ignore_eos=True)
            tokens = aiter(generation)
            await anext(tokens)
            owner.kill()
            async with asyncio.timeout(5):
                with pytest.raises(EngineDeadError):
                    await generation
    finally:
        with contextlib.suppress(ProcessLookupError):
            owner.kill()
        await owner.communicate()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- the address


@pytest.mark.parametrize(
    ("host", "pattern"),
    [
        ("localhost", r"tcp://(127\.0\.0\.1|\[::1\]):\d+/\?key=[0-9a-f]{64}"),
        ("0.0.0.0", r"tcp://(?!0\.0\.0\.0)[\d.]+:\d+/\?key=[0-9a-f]{64}"),
        ("::1", r"tcp://\[::1\]:\d+/\?key=[0-9a-f]{64}"),
    ],
)
async def test_what_is_published_can_be_attached_to(host: str, pattern: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    async with AsyncScaleClient(FAST, num_engines=1, host=host) as client:
        assert re.fullmatch(pattern, client.address)
        async with AsyncScaleClient.attach(client.address) as other:
            assert len((await other.generate("hello", **TEN)).token_ids) == 10


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


async def test_keys_are_made_anew_at_each_start(client: AsyncScaleClient) -> None:
    async with AsyncScaleClient(FAST, num_engines=1, host=HERE) as another:
        assert key_of(another.address) != key_of(client.address)
        port = parse(client.address).endpoint.rpartition(":")[2]
        with pytest.raises(AsyncScaleError, match="does not let this client in"):
            await AsyncScaleClient.attach(f"tcp://{HERE}:{port}/?key={key_of(another.address)}").start()
    await assert_serving(client)


@pytest.mark.parametrize("host", ["", "192.0.2.77", "no such host.invalid", "a\0b", "x" * 300, "127.0.0.1:80"])
async def test_a_host_that_is_not_of_this_machine_is_refused_by_the_start(host: str) -> None:
    with pytest.raises(ValueError, match="host must be"):
        await AsyncScaleClient(FAST, num_engines=1, host=host).start()


async def test_the_key_is_in_no_repr_log_or_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with AsyncScaleClient(FAST, num_engines=1, host=HERE) as client:
        key, said = key_of(client.address), []
        attached = AsyncScaleClient.attach(client.address)
        supervisor = client._engines.supervisor  # type: ignore[attr-defined]
        binding, (engine,) = supervisor._launch.tcp, supervisor.engines.values()
        secrets = [key, repr(binding.keys.secret)[2:-1], repr(binding.keys.public)[2:-1], binding.keys.secret.hex()]
        async with attached:
            members = client._engines.roster.members
            welcome = messages.Welcome(1, FAST, members)
            said += map(repr, (client, attached, supervisor._launch, engine, members, welcome, binding))
            said += map(str, (messages.Joined(members[0]), parse(client.address), engine.process, engine.spec))
            os.kill(engine.pid, signal.SIGKILL)
            said += map(repr, await death_of(attached))
        flipped = client.address[:-1] + ("0" if client.address[-1] != "0" else "2")
        address = client.address
    for wrong in (flipped, address, address + "0", address[:-1], address.replace("tcp", "udp"), address[6:], key):
        with pytest.raises((AsyncScaleError, ValueError)) as caught:
            await AsyncScaleClient.attach(wrong).start()
        said += [str(caught.value), repr(caught.value)]
    said += [caplog.text]
    assert [text for text in said for secret in secrets if secret in text or secret[:32] in text] == []


async def death_of(client: AsyncScaleClient) -> tuple[str | None, EngineDeadError]:
    """How the only engine of a client died, when it has, in health and as an error."""
    while client.health()[0].state == "ready":  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return client.health()[0].last_error, client._dispatcher._fleet.deaths[0]


# --- peers that are not let in


def curve(server_key: bytes, swapped: bool = False) -> dict[str, Any]:
    public, secret = zmq.curve_keypair()
    return {
        "CURVE_SERVERKEY": server_key,
        "CURVE_PUBLICKEY": public,
        "CURVE_SECRETKEY": zmq.curve_keypair()[1] if swapped else secret,
    }


INTRUDERS: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "in clear text": lambda key: {},
    "with a password": lambda key: {"PLAIN_USERNAME": b"admin", "PLAIN_PASSWORD": b"admin"},
    "with a key of its own choice": lambda key: curve(zmq.curve_keypair()[0]),
    "with one bit of the key wrong": lambda key: curve(bytes([key[0] ^ 1]) + key[1:]),
    "with a key of zeros": lambda key: curve(bytes(32)),
    "with the key, and a key pair that is none": lambda key: curve(key, swapped=True),
    "as a server": lambda key: {"CURVE_SERVER": 1, "CURVE_SECRETKEY": zmq.curve_keypair()[1]},
}


@pytest.fixture
def intrude() -> Iterator[Callable[..., zmq.Socket[bytes]]]:
    """Makes DEALERs that connect to an endpoint with the options given, and say what a client would."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = []

    def make(endpoint: str, options: dict[str, Any]) -> zmq.Socket[bytes]:
        sockets.append(dealer := context.socket(zmq.DEALER))
        for name, value in options.items():
            dealer.setsockopt(getattr(zmq, name), value)
        dealer.connect(endpoint)
        for message in (messages.Attach(1), messages.Connect(1), messages.Call(1, "process_info", [])):
            dealer.send(messages.encoder.encode(message))
        return dealer

    yield make
    for dealer in sockets:
        dealer.close(linger=0)
    context.term()


async def test_peers_without_the_key_are_not_let_in(
    client: AsyncScaleClient, intrude: Callable[..., zmq.Socket[bytes]]
) -> None:
    intruders, friends = {}, []
    for address in addresses(client):
        where = parse(address)
        assert where.server_key is not None
        for name, options in INTRUDERS.items():
            intruders[name, where.endpoint] = intrude(where.endpoint, options(where.server_key))
        friends.append(intrude(where.endpoint, curve(where.server_key)))
    for friend in friends:  # who came last, with the key, is answered
        assert await asyncio.to_thread(friend.poll, 5000)
    await assert_serving(client)
    assert [name for name, intruder in intruders.items() if intruder.poll(0)] == []
    infos = await client.collective_rpc("process_info")
    assert [info["num_malformed"] for info in infos] == [1, 1]  # the friends' Attach


async def test_sockets_that_speak_no_zmtp_or_nothing_at_all_keep_nobody_out(client: AsyncScaleClient) -> None:
    greeting = b"\xff\0\0\0\0\0\0\0\1\x7f\3\1CURVE" + bytes(15)  # ZMTP 3.1, then nothing
    for address in addresses(client):
        host, _, port = parse(address).endpoint.removeprefix("tcp://").rpartition(":")
        writers = []
        for number in range(60):
            _, writer = await asyncio.open_connection(host, int(port))
            writers.append(writer)
            if number % 4 == 1:
                writer.write(os.urandom(10_000))
            elif number % 4 == 2:
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
            elif number % 4 == 3:
                writer.write((greeting + os.urandom(200 * (number % 8 > 3)))[:200])
        await assert_serving(client)
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    await assert_serving(client)


async def test_a_peer_that_hangs_in_the_handshake_is_disconnected(client: AsyncScaleClient) -> None:
    host, _, port = parse(client.address).endpoint.removeprefix("tcp://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(20):
        while await reader.read(1000):
            pass
    writer.close()


async def test_attaching_to_what_is_no_owner_raises_and_to_engines_that_are_none_harms_nobody(
    client: AsyncScaleClient,
) -> None:
    """A web server, say: libzmq gives up on a peer that speaks another protocol, and takes no more messages for it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
        with contextlib.suppress(OSError):
            await writer.drain()
            writer.close()

    web_server = await asyncio.start_server(answer, HERE, 0)
    async with web_server:
        address = f"tcp://{HERE}:{web_server.sockets[0].getsockname()[1]}/?key={key_of(client.address)}"
        async with asyncio.timeout(10):
            with pytest.raises(AsyncScaleError, match="does not let this client in"):
                await AsyncScaleClient.attach(address).start()
        async with AsyncScaleClient.attach(client.address) as other:
            known = client._engines.roster.members[0]
            other._engines.roster.join(msgspec.structs.replace(known, engine_id=7, address=address))
            await asyncio.sleep(0.2)
            lost = other.generate("who hears this?", engine=7, **TEN)
            lost.abort()
    await assert_serving(client)
