"""An engine's turns, one by one, behind a real ROUTER: who is told what, when, and in how many messages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from asyncscale import messages, transport
from asyncscale.engine import server as server_module
from asyncscale.engine.server import EngineServer
from asyncscale.params import Sampling

VERSION = messages.PROTOCOL_VERSION
ADDRESS = "inproc://engine"


class _Done(Exception):
    pass


class SteppedServer(EngineServer):
    """Takes so many turns of its endless loop, and no more."""

    turns = 0

    def turn(self, count: int = 1) -> None:
        self.turns = count
        with contextlib.suppress(_Done):
            self.run()
        self._send_outputs()  # as the next step does while it computes

    def _receive(self) -> None:
        if self.turns == 0:
            raise _Done
        self.turns -= 1
        super()._receive()


class Rig:
    """A server of one simulated engine, its clients' sockets, and the clock that it looks at."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.core, self.runner = engine.core, engine.runner
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets = {b"": transport.bind_router(self._context, ADDRESS)}
        self.server = SteppedServer(self.core, self._sockets[b""], num_engines=1)
        monkeypatch.setattr(server_module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def close(self) -> None:
        self._context.destroy(linger=0)

    def join(self, name: bytes, watch_loads: bool = False) -> None:
        """A client connects, and is told the load; a moment later everybody is, to see who is still there."""
        self._sockets[name] = transport.connect_dealer(self._context, ADDRESS, name)
        self.send(name, messages.Connect(VERSION, watch_loads))
        self.server.turn()
        (report,) = self.received(name)
        assert isinstance(report, messages.LoadReport)
        self.now += server_module._PROBE_INTERVAL_S
        self.server.turn()
        for known in self._sockets:
            if known:
                self.received(known)

    def vanish(self, name: bytes) -> None:
        """A client is gone without a word, and the server's socket has noticed."""
        self._sockets.pop(name).close(linger=0)
        with contextlib.suppress(zmq.ZMQError):
            while True:
                self._sockets[b""].send_multipart([name, b""])

    def send(self, name: bytes, message: messages.ToEngine) -> None:
        self._sockets[name].send(messages.encoder.encode(message))

    def add(self, name: bytes, request_id: int, max_tokens: int = 100, num_tokens: int = 4) -> None:
        token_ids = b"\1\0\0\0" * num_tokens
        self.send(name, messages.Add(request_id, token_ids, num_tokens, Sampling(max_tokens), weight=7))

    def received(self, name: bytes) -> list[messages.FromEngine]:
        """All that has arrived since the last look."""
        found = []
        while self._sockets[name].poll(0):
            message = messages.decode(messages.from_engine_decoder, self._sockets[name].recv())
            assert message is not None
            found.append(message)
        return found

    def newest(self, name: bytes) -> messages.Load:
        return self.received(name)[-1].load  # type: ignore[union-attr]


@pytest.fixture
def rig(make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(make_engine(), monkeypatch)
    yield rig
    rig.close()


def settle(rig: Rig) -> None:
    """Let time pass until everybody knows the load."""
    while (timeout := rig.server._idle_ms()) is not None:
        rig.now += timeout / 1000
        rig.server.turn()


# --- counts are told before a step


def test_others_are_told_what_arrived_before_the_step_not_after_it(rig: Rig) -> None:
    rig.join(b"a")
    rig.join(b"b")
    seen: list[list[messages.FromEngine]] = []
    rig.runner.before_execute = lambda: seen.append(rig.received(b"b"))
    rig.now += 1
    rig.add(b"a", 1)
    rig.server.turn()
    ((report,),) = seen
    assert isinstance(report, messages.LoadReport)
    assert (report.load.running, report.load.waiting, report.load.mine, report.load.tokens) == (1, 0, 0, 7)


def test_a_sole_client_gets_exactly_one_message_per_step(rig: Rig) -> None:
    rig.join(b"a")
    rig.now += 1
    rig.add(b"a", 1, max_tokens=5)
    rig.add(b"a", 2, max_tokens=8)
    for step in range(1, 9):
        rig.server.turn()
        (outputs,) = rig.received(b"a")
        assert isinstance(outputs, messages.Outputs)
        assert outputs.load.mine == (2 if step < 5 else 1 if step < 8 else 0)
    assert rig.server._idle_ms() is None


# --- how often


def test_who_watches_hears_of_a_burst_once_and_of_everybodys_share(rig: Rig) -> None:
    rig.join(b"watcher", watch_loads=True)
    for name in (b"a", b"b"):
        rig.join(name)
    rig.received(b"watcher")
    rig.now += 1
    for request_id in range(5):
        rig.add(b"a", request_id)
    rig.add(b"b", 0)
    seen: list[list[messages.FromEngine]] = []
    rig.runner.before_execute = lambda: seen.append(rig.received(b"watcher"))
    rig.server.turn()
    ((report,),) = seen
    assert isinstance(report, messages.LoadReport)
    assert report.load.running == 6
    assert report.by_client == {b"a": (5, 35), b"b": (1, 7)}


def test_who_watches_hears_of_every_change_and_others_every_50_ms(rig: Rig) -> None:
    rig.join(b"watcher", watch_loads=True)
    rig.join(b"idle")
    rig.join(b"a")
    rig.core.pause()  # so that nothing but arrivals changes the counts
    rig.now += 1
    rig.server._report_load()
    for name in (b"watcher", b"idle"):
        rig.received(name)
    told: dict[bytes, list[int]] = {b"watcher": [], b"idle": []}
    rig.now += 1
    num_arrivals = 100
    for request_id in range(num_arrivals):
        rig.add(b"a", request_id)
        rig.server.turn()
        for name, counts in told.items():
            counts += [message.load.waiting for message in rig.received(name)]  # type: ignore[union-attr]
        rig.now += 1 / 512
    assert told[b"watcher"] == list(range(1, num_arrivals + 1))
    assert told[b"idle"] == [1, 27, 53, 79]  # the first at once, then every 26 / 512 s
    assert rig.server._idle_ms() == math.ceil(1000 * (messages.LOAD_INTERVAL_S - 22 / 512))
    rig.now += messages.LOAD_INTERVAL_S
    rig.server.turn()
    assert rig.newest(b"idle").waiting == num_arrivals


def test_an_idle_engine_whose_clients_all_know_the_load_sleeps_without_an_end(rig: Rig) -> None:
    rig.join(b"a")
    rig.join(b"b")
    rig.now += 1
    rig.add(b"a", 1, max_tokens=3)
    rig.server.turn(3)
    assert not rig.core.has_work
    assert rig.newest(b"a").mine == 0
    assert rig.server._idle_ms() == 1000 * messages.LOAD_INTERVAL_S  # b was told just now that there is a request
    settle(rig)
    assert rig.newest(b"b").running == 0
    assert rig.server._idle_ms() is None


def test_connecting_again_switches_watching_on_and_off_and_is_answered_at_once(rig: Rig) -> None:
    rig.join(b"a")
    for watch_loads in (True, True, False):
        rig.send(b"a", messages.Connect(VERSION, watch_loads))
        rig.server.turn()
        (report,) = rig.received(b"a")
        assert isinstance(report, messages.LoadReport)
        assert (report.by_client is not None) == watch_loads


@pytest.mark.parametrize("method", ["pause", "drain"])
def test_whether_it_takes_requests_is_told_everybody_at_once_and_before_the_answer(rig: Rig, method: str) -> None:
    rig.join(b"watcher", watch_loads=True)
    rig.join(b"idle")
    for name, accepting in [(method, False), ("resume", True)]:
        rig.send(b"watcher", messages.Call(1, name, []))
        rig.server.turn()
        report, result = rig.received(b"watcher")
        assert isinstance(report, messages.LoadReport)
        assert isinstance(result, messages.CallResult)
        assert (report.load.accepting, rig.newest(b"idle").accepting) == (accepting, accepting)


# --- clients that are gone


def test_a_client_that_vanished_is_forgotten_with_the_next_change(rig: Rig) -> None:
    rig.join(b"gone")
    rig.join(b"a")
    rig.vanish(b"gone")
    assert len(rig.server._peers) == 2
    rig.now += 1
    rig.add(b"a", 1, max_tokens=1)
    rig.server.turn()
    assert list(rig.server._peers) == [b"a"]


def test_requests_of_a_client_that_vanished_end_with_its_next_tokens(rig: Rig) -> None:
    rig.join(b"gone")
    rig.join(b"a")
    rig.add(b"gone", 1)
    rig.server.turn(2)
    rig.vanish(b"gone")
    rig.server.turn(2)
    assert not rig.core.has_work
    settle(rig)
    load = rig.newest(b"a")
    assert (load.running, load.waiting, load.used_blocks) == (0, 0, 0)


def test_others_hear_that_a_vanished_clients_request_is_gone_though_nothing_else_happens(rig: Rig) -> None:
    """Its death is seen when it is told of a change, and is itself one: for those who were told just before, too."""
    rig.join(b"a")
    rig.join(b"gone")

    def vanish() -> None:  # its prompt needs two steps: of this one it gets no token, only counts
        rig.vanish(b"gone")
        rig.now += 1

    rig.runner.before_execute = vanish
    rig.add(b"a", 1, max_tokens=1)
    rig.add(b"gone", 1, num_tokens=100)
    rig.server.turn()
    assert not rig.core.has_work
    settle(rig)
    load = rig.newest(b"a")
    assert (load.running, load.waiting, load.mine) == (0, 0, 0)


def test_a_client_that_vanished_while_its_requests_only_wait_is_forgotten_though_nothing_happens(rig: Rig) -> None:
    rig.join(b"gone")
    rig.core.pause()
    rig.add(b"gone", 1)
    rig.server.turn()
    rig.vanish(b"gone")
    assert rig.server._idle_ms() == 1000 * server_module._PROBE_INTERVAL_S
    rig.now += server_module._PROBE_INTERVAL_S
    rig.server.turn()
    assert not rig.core.clients
    assert not rig.server._peers
    settle(rig)


def test_clients_that_come_and_vanish_without_a_request_do_not_add_up(rig: Rig) -> None:
    rig.join(b"stays")
    for number in range(50):
        rig.join(b"gone-%d" % number)
        rig.vanish(b"gone-%d" % number)
    rig.join(b"last")
    assert sorted(rig.server._peers) == [b"last", b"stays"]
    assert rig.server._idle_ms() is None


# --- clients that do not read


def fall_behind(rig: Rig, name: bytes) -> int:
    """Change the load, by a paused client's arrivals, many times more often than an unread client is told of.

    Returns how many messages were queued for `name`.
    """
    rig.core.pause()
    for request_id in range(3 * messages.READ_INTERVAL):
        rig.add(b"busy", request_id)
        rig.server.turn()
        rig.now += messages.LOAD_INTERVAL_S
        rig.received(b"busy")
        rig.send(b"busy", messages.Read(10))
    return len(rig.received(name))


@pytest.mark.parametrize("watches", [False, True])
def test_a_client_that_does_not_read_is_told_so_much_and_the_newest_load_when_it_reads(rig: Rig, watches: bool) -> None:
    rig.join(b"behind", watch_loads=watches)
    rig.join(b"busy")
    behind = fall_behind(rig, b"behind")
    assert behind <= 2 * messages.READ_INTERVAL
    rig.send(b"behind", messages.Read(messages.READ_INTERVAL))
    rig.server.turn()
    (report,) = rig.received(b"behind")
    assert isinstance(report, messages.LoadReport)
    assert report.load.waiting == 3 * messages.READ_INTERVAL
    assert (report.by_client is not None) == watches


def test_tokens_of_a_client_that_does_not_read_wait_for_it_without_the_others_shares(rig: Rig) -> None:
    rig.join(b"behind", watch_loads=True)
    rig.server._peers[b"behind"].num_unread = 2 * messages.READ_INTERVAL
    rig.add(b"behind", 1, max_tokens=20)
    rig.server.turn(20)
    told = rig.received(b"behind")
    assert [len(outputs.token_ids) for outputs in told if isinstance(outputs, messages.Outputs)] == [1] * 20
    assert not [message for message in told if message.by_client is not None]  # type: ignore[union-attr]


def test_connecting_again_does_not_make_a_client_one_that_reads(rig: Rig) -> None:
    rig.join(b"behind")
    rig.server._peers[b"behind"].num_unread = 2 * messages.READ_INTERVAL
    for _ in range(10):
        rig.send(b"behind", messages.Connect(VERSION, watch_loads=True))
        rig.server.turn()
    assert not rig.received(b"behind")
    rig.send(b"behind", messages.Read(-(2**63)))
    rig.send(b"behind", messages.Read(1))
    rig.server.turn()
    assert len(rig.received(b"behind")) == 1


def test_a_client_that_reads_gets_one_message_per_step_whether_another_reads_or_not(rig: Rig) -> None:
    rig.join(b"behind", watch_loads=True)
    rig.join(b"a")
    rig.server._peers[b"behind"].num_unread = 2 * messages.READ_INTERVAL - 10
    rig.add(b"behind", 1, max_tokens=100)
    rig.add(b"a", 1, max_tokens=100)
    for _ in range(100):
        rig.server.turn()
        (outputs,) = [message for message in rig.received(b"a") if isinstance(message, messages.Outputs)]
        assert outputs.request_ids == [1]
        rig.send(b"a", messages.Read(1))


# --- shares


def test_what_a_client_has_over_several_connections_is_its_share(rig: Rig) -> None:
    client = b"c" * messages.CLIENT_ID_SIZE
    rig.join(b"watcher", watch_loads=True)
    for life in (b"1", b"2"):
        rig.join(client + life)
        rig.add(client + life, 1)
    rig.now += 1
    rig.server.turn()
    (*_, report) = rig.received(b"watcher")
    assert isinstance(report, messages.LoadReport)
    assert report.by_client == {client: (2, 14)}
