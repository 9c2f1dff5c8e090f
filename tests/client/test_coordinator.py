"""The coordinator with real sockets, in one process: who is told what, how often, and what a slow reader costs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from asyncscale import messages
from asyncscale.client import coordinator as coordinator_module

MakeFleet = Callable[[int], Awaitable[Any]]
FOR_EVER = 1e6


def counts(message: Any) -> dict[int, tuple[int, int]]:
    """Engine id -> (running, mine), of a Counts."""
    assert isinstance(message, messages.Counts)
    return {engine_id: (load.running, load.mine) for engine_id, load in message.loads}


def welcomed(welcome: Any) -> dict[int, int]:
    """Engine id -> running, of a Welcome."""
    assert isinstance(welcome, messages.Welcome)
    return {member.engine_id: member.load.running for member in welcome.members}


def is_welcome(message: Any) -> bool:
    return isinstance(message, messages.Welcome)


def report(fleet: Any, engine_id: int, version: int, running: int, by_client: Any = None) -> None:
    """What the dispatcher passes on of an engine's own report."""
    load = messages.Load(version, running, 0, 0, 0, 0, 0, 1000)
    fleet.coordinator._on_load_report(engine_id, messages.LoadReport(load, by_client or {}))


# --- newcomers


async def test_late_subscriber_has_members_and_counts_with_its_first_message(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(2)
    fleet.engines[0].tell_owner(running=3)
    fleet.engines[1].tell_owner(running=5)
    await fleet.owner_knows()
    _, welcome = await fleet.attach()
    assert welcomed(welcome) == {0: 3, 1: 5}
    assert [member.load.mine for member in welcome.members] == [0, 0]
    assert [member.address for member in welcome.members] == [engine.member.address for engine in fleet.engines]


async def test_late_subscriber_is_not_told_what_was_true_when_the_last_client_left(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    first, _ = await fleet.attach()
    fleet.engines[0].tell_owner(by_client={first.identity: (7, 70)}, running=7)
    await first.receive_until(lambda message: isinstance(message, messages.Counts) and counts(message) == {0: (7, 7)})
    first.send(messages.Detach())
    await fleet.until(lambda: fleet.engines[0].connects() == [False, True, False])
    fleet.engines[0].tell_owner(running=2)
    await fleet.owner_knows()
    _, welcome = await fleet.attach()
    assert welcomed(welcome) == {0: 2}


async def test_a_newcomer_sees_engines_that_come_and_go_after_it(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    peer, _ = await fleet.attach()
    joiner = fleet.join()
    *_, joined = await peer.receive_until(lambda message: isinstance(message, messages.Joined))
    assert joined.member == joiner.member
    fleet.kill(fleet.engines[0])
    *_, left = await peer.receive_until(lambda message: isinstance(message, messages.Left))
    assert (left.engine_id, left.reason, left.exit_code) == (0, "engine 0 died", -9)
    _, welcome = await fleet.attach()
    assert welcomed(welcome) == {1: 0}


# --- how often


async def test_after_quiet_a_change_is_published_at_once_then_once_per_interval(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    peer, _ = await fleet.attach()
    first = await peer.receive()  # the answer to the owner's watching
    assert counts(first) == {0: (0, 0)}
    fleet.coordinator._next_publish = FOR_EVER
    for number in range(1, 101):
        report(fleet, 0, number, running=number)
        await asyncio.sleep(0)
    fleet.coordinator._publish()  # as when the interval is over
    assert counts(await peer.receive()) == {0: (100, 0)}
    fleet.coordinator._publish()
    await fleet.attach()  # a round trip later, nothing more has come
    assert not peer.socket.poll(0)


async def test_the_more_clients_the_rarer_are_counts_published_but_never_rarer_than_engines_tell_them(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = await make_fleet(1)
    await fleet.attach()
    await fleet.attach()
    with monkeypatch.context() as patch:
        patch.setattr(fleet.coordinator, "_loop", SimpleNamespace(time=lambda: 1000.0))
        fleet.coordinator._publish()
        assert fleet.coordinator._next_publish == pytest.approx(1000 + 2 * coordinator_module._PUBLISH_INTERVAL_S)
        patch.setattr(coordinator_module, "_PUBLISH_INTERVAL_S", FOR_EVER)
        fleet.coordinator._publish()
        assert fleet.coordinator._next_publish == pytest.approx(1000 + messages.LOAD_INTERVAL_S)


async def test_constant_reports_do_not_starve_publishing(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    peer, _ = await fleet.attach()
    num_counts = version = 0
    async with asyncio.timeout(30):
        while num_counts < 20:
            version += 1
            report(fleet, 0, version, running=version)
            await asyncio.sleep(0)
            while peer.socket.poll(0):
                peer.socket.recv()
                num_counts += 1
    assert num_counts < version


async def test_reports_out_of_order_do_not_go_back(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    peer, _ = await fleet.attach()
    for version in (3, 2, 5, 4):
        report(fleet, 0, version, running=version)
    seen = await peer.receive_until(lambda message: counts(message) == {0: (5, 0)})
    assert [counts(message)[0][0] for message in seen] in ([0, 5], [5])


# --- to whom


async def test_each_client_is_told_its_own_share(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(2)
    (a, _), (b, _) = await fleet.attach(), await fleet.attach()
    await fleet.until(lambda: fleet.coordinator._reports.keys() == {0, 1})
    shares = {a.identity: (2, 20), b.identity: (3, 30), b"another": (1, 10)}
    fleet.engines[1].tell_owner(by_client=shares, running=6, tokens=60)
    for peer, (mine, my_tokens) in ((a, (2, 20)), (b, (3, 30))):
        *_, message = await peer.receive_until(lambda message: counts(message).get(1, (0, 0))[0] == 6)
        load = dict(message.loads)[1]
        assert (load.mine, load.my_tokens, load.tokens) == (mine, my_tokens, 60)


async def test_malformed_frames_are_counted_and_answered_with_nothing(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    peer = fleet.peer()
    peer.socket.send(b"")
    peer.socket.send(b"noise")
    peer.socket.send_multipart([b"two", b"frames"])
    peer.socket.send(messages.encoder.encode(messages.Farewell()))
    await fleet.until(lambda: fleet.coordinator.num_malformed == 4)
    peer.send(messages.Attach(messages.PROTOCOL_VERSION))
    assert is_welcome(await peer.receive())


async def test_engines_are_watched_from_the_first_client_to_the_last(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(2)
    peers = [(await fleet.attach())[0] for _ in range(3)]
    joiner = fleet.join()
    await fleet.until(lambda: joiner.connects() == [True])
    for peer in peers:
        peer.send(messages.Detach())
    await fleet.until(lambda: all(engine.connects()[-1:] == [False] for engine in fleet.engines))
    assert [engine.connects() for engine in fleet.engines] == [[False, True, False]] * 2 + [[True, False]]
    assert not fleet.coordinator._clients


async def test_a_client_that_vanished_is_forgotten_with_the_next_change(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    gone, _ = await fleet.attach()
    other, _ = await fleet.attach()
    gone.socket.close(linger=0)
    other.socket.close(linger=0)
    version = 0

    def is_forgotten() -> bool:
        nonlocal version
        version += 1
        report(fleet, 0, version, running=version)
        return not fleet.coordinator._clients

    await fleet.until(is_forgotten)
    await fleet.until(lambda: fleet.engines[0].connects() == [False, True, False])


async def test_clients_that_come_and_vanish_while_no_count_changes_do_not_add_up(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "_PROBE_DELAY_S", 0.01)
    fleet = await make_fleet(1)
    stays, _ = await fleet.attach()
    for _ in range(30):
        gone, _ = await fleet.attach()
        gone.socket.close(linger=0)
    last, _ = await fleet.attach()
    await fleet.until(lambda: fleet.coordinator._probing is None)
    await fleet.attach()  # one may have vanished between a probe and its closing
    await fleet.until(lambda: fleet.coordinator._probing is None)
    assert {stays.identity, last.identity} <= set(fleet.coordinator._clients)
    assert len(fleet.coordinator._clients) <= 3


# --- who does not read


async def fall_behind(fleet: Any, peer: Any) -> int:
    """Publish counts that the peer does not read, until it is sent no more. Returns the newest version."""
    client = fleet.coordinator._clients[peer.identity]
    version = 0
    while not client.behind:
        version += 1
        report(fleet, 0, version, running=version)
        fleet.coordinator._publish()
        assert version < 20_000, "any number of messages is queued for a client that does not read"
        if version % 100 == 0:
            await asyncio.sleep(0)
    return version


async def test_a_client_that_reads_nothing_is_sent_a_bounded_number_of_messages_and_then_the_newest_state(
    make_fleet: MakeFleet,
) -> None:
    fleet = await make_fleet(2)
    peer, _ = await fleet.attach()
    behind_at = await fall_behind(fleet, peer)
    for version in range(behind_at + 1, behind_at + 5001):
        report(fleet, 0, version, running=version)
        fleet.coordinator._publish()
    fleet.kill(fleet.engines[1])
    joiner = fleet.join()
    seen = await peer.receive_until(is_welcome)
    assert len(seen) <= behind_at + 1
    assert welcomed(seen[-1]) == {0: behind_at + 5000, joiner.engine_id: 0}
    report(fleet, 0, behind_at + 6000, running=1)
    await peer.receive_until(lambda message: isinstance(message, messages.Counts) and counts(message)[0] == (1, 0))


async def test_a_client_that_reads_nothing_does_not_delay_the_counts_of_others(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "_RETRY_INTERVAL_S", FOR_EVER)
    fleet = await make_fleet(1)
    slow, _ = await fleet.attach()
    version = await fall_behind(fleet, slow)
    reader, _ = await fleet.attach()
    for number in range(version + 1, version + 11):
        report(fleet, 0, number, running=number)
        await reader.receive_until(lambda message: counts(message) == {0: (number, 0)})  # noqa: B023


async def test_answers_to_the_calls_of_a_client_that_reads_nothing_follow_when_it_reads(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(2)
    peer, _ = await fleet.attach()
    await fall_behind(fleet, peer)
    for call_id in range(3):
        peer.send(messages.CollectiveCall(call_id, "profile", [msgspec.Raw(b"\xc3")]))
    client = fleet.coordinator._clients[peer.identity]
    await fleet.until(lambda: len(client.results) == 3)
    assert client.behind
    await peer.receive_until(is_welcome)
    for call_id in range(3):
        (*_, result) = await peer.receive_until(lambda message: isinstance(message, messages.CollectiveResult))
        assert result.call_id == call_id
        assert [msgspec.msgpack.decode(answer.value) for answer in result.results] == [
            [engine_id, "profile", True] for engine_id in (0, 1)
        ]
    assert not client.results


async def test_a_caller_knows_the_counts_from_before_an_answer_with_the_answer(make_fleet: MakeFleet) -> None:
    """An engine tells that it pauses before it answers: with the answer, the caller's table must say so, too."""
    fleet = await make_fleet(1)
    peer, _ = await fleet.attach()
    await peer.receive()
    fleet.coordinator._next_publish = FOR_EVER
    fleet.engines[0].silent = True
    peer.send(messages.CollectiveCall(1, "pause", []))
    await fleet.until(lambda: fleet.engines[0].calls() == [("pause", [])])
    ((sender, call),) = [entry for entry in fleet.engines[0].received if isinstance(entry[1], messages.Call)]
    fleet.engines[0].tell_owner(by_client={}, accepting=False)
    fleet.engines[0].send(sender, messages.CallResult(call.call_id))
    first, second = await peer.receive(), await peer.receive()
    assert isinstance(first, messages.Counts)
    assert not dict(first.loads)[0].accepting
    assert isinstance(second, messages.CollectiveResult)


# --- the end


async def test_farewell_is_the_last_thing_that_clients_hear(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(1)
    peers = [(await fleet.attach())[0] for _ in range(2)]
    report(fleet, 0, 1, running=1)
    fleet.coordinator.close()
    fleet.coordinator.close()
    for peer in peers:
        await peer.receive_until(lambda message: isinstance(message, messages.Farewell))
        assert not peer.socket.poll(0)


async def test_calls_beyond_a_number_are_refused_while_others_are_under_way(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "_MAX_CALLS", 3)
    fleet = await make_fleet(2)
    peer, _ = await fleet.attach()
    for engine in fleet.engines:
        engine.silent = True
    for call_id in range(4):
        peer.send(messages.CollectiveCall(call_id, "kv_cache_stats", []))
    (*_, refused) = await peer.receive_until(lambda message: isinstance(message, messages.CollectiveResult))
    assert refused.call_id == 3
    assert ["too many calls" in result.error for result in refused.results] == [True, True]
    await fleet.until(lambda: all(len(engine.calls()) == 3 for engine in fleet.engines))
