"""Limits of what a client may hold back, against a plain list of what is held and who waits."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncscale.client.admission import Admission
from asyncscale.client.hold_queue import HoldQueue
from asyncscale.client.stream import RequestStream
from asyncscale.errors import OverloadedError

MAX_REQUESTS, MAX_TOKENS = 4, 100


class Request:
    """As much of a request as the queues look at."""

    def __init__(self, order: int, priority: int = 0, num_tokens: int = 10, engine: int | None = None) -> None:
        self.order = order
        self.priority = priority
        self.prompt_token_ids = [0] * num_tokens
        self.pinned_engine = engine

    @property
    def rank(self) -> tuple[int, int]:
        return self.priority, self.order


def stream(order: int, priority: int = 0, num_tokens: int = 10, engine: int | None = None) -> RequestStream:
    return cast("RequestStream", Request(order, priority, num_tokens, engine))


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.queue = HoldQueue()
        self.admission = Admission(self.queue, MAX_REQUESTS, MAX_TOKENS, lambda engine: 0)
        self.held: list[RequestStream] = []
        self.line: list[RequestStream] = []
        self.futures: dict[RequestStream, asyncio.Future[None]] = {}
        self.next_order = 0

    def make(self, priority: int, num_tokens: int) -> RequestStream:
        self.next_order += 1
        return stream(self.next_order, priority, num_tokens)

    def fits(self, request: RequestStream) -> bool:
        tokens = sum(len(held.prompt_token_ids) for held in self.held) + len(request.prompt_token_ids)
        return len(self.held) < MAX_REQUESTS and tokens <= MAX_TOKENS

    @rule(priority=st.integers(-1, 1), num_tokens=st.integers(1, 60))
    def generate(self, priority: int, num_tokens: int) -> None:
        request = self.make(priority, num_tokens)
        if self.fits(request) and not self.line:
            self.admission.check(None, num_tokens)
            self.queue.push(request)
            self.held.append(request)
        else:
            with pytest.raises(OverloadedError):
                self.admission.check(None, num_tokens)

    @rule(priority=st.integers(-1, 1), num_tokens=st.integers(1, 60))
    def submit(self, priority: int, num_tokens: int) -> None:
        request = self.make(priority, num_tokens)

        async def wait() -> asyncio.Future[None]:
            return self.admission.wait(request)

        self.futures[request] = self.loop.run_until_complete(wait())
        self.line.append(request)
        self.admit()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def one_is_sent_or_ends(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.held))
        self.held.remove(request)
        self.queue.discard(request)
        self.queue.discard(request)
        self.admit()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def one_that_waits_gives_up(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.line))
        self.line.remove(request)
        self.admission.leave(request)
        assert self.futures[request].done()
        self.admit()

    @precondition(lambda self: self.line)
    @rule()
    def an_engine_has_room(self) -> None:
        first = min(self.line, key=lambda request: (request.priority, request.order))
        assert self.admission.next(has_room=True) is first
        self.line.remove(first)
        assert self.futures[first].done()
        self.admit()

    def admit(self) -> None:
        while (request := self.admission.next(has_room=False)) is not None:
            assert request is min(self.line, key=lambda each: (each.priority, each.order))
            assert self.fits(request)
            assert self.futures[request].done()
            self.line.remove(request)
            self.queue.push(request)
            self.held.append(request)

    @invariant()
    def nobody_waits_beside_a_place(self) -> None:
        if self.line:
            assert not self.fits(min(self.line, key=lambda each: (each.priority, each.order)))

    @invariant()
    def counts_are_exact(self) -> None:
        assert len(self.queue) == len(self.held)
        assert self.queue.num_tokens == sum(len(request.prompt_token_ids) for request in self.held)
        assert len(self.admission) == len(self.line)
        assert not any(self.futures[request].done() for request in self.line)
        if self.held:
            assert self.queue.first is min(self.held, key=lambda each: (each.priority, each.order))

    def teardown(self) -> None:
        self.loop.close()


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_ended_requests_deep_in_the_queue_take_no_memory() -> None:
    queue = HoldQueue()
    keep = [stream(order, priority=-1) for order in range(10)]
    for request in keep:
        queue.push(request)
    for order in range(100_000):
        request = stream(order)
        queue.push(request)
        queue.discard(request)
    assert len(queue) == 10
    assert len(queue._heap) < 1000


def test_without_limits_nothing_is_refused() -> None:
    admission = Admission(HoldQueue(), None, None, lambda engine: 10**9)
    assert not admission.is_limited
    admission.check(None, 10**9)
    admission.check(0, 10**9)


async def test_who_waits_for_one_engine_does_not_hold_up_the_others() -> None:
    waiting_at = {0: 2, 1: 2}
    admission = Admission(HoldQueue(), 2, None, waiting_at.__getitem__)
    pinned = [stream(order, engine=order % 2) for order in range(4)]
    futures = [admission.wait(request) for request in pinned]
    assert admission.next(has_room=True) is None
    for engine in (0, 1):
        with pytest.raises(OverloadedError, match="2 requests of this client wait for a place"):
            admission.check(engine, 1)
    admission.check(None, 1)
    waiting_at[1] = 1
    assert admission.next(has_room=False) is pinned[1]
    assert [future.done() for future in futures] == [False, True, False, False]
    anywhere = stream(9)
    admission.wait(anywhere)
    waiting_at[1] = 2
    assert admission.next(has_room=True) is anywhere
    assert admission.waiting == [pinned[0], pinned[2], pinned[3]]
