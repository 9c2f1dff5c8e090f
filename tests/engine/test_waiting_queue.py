from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asyncscale.engine.request import Request
from asyncscale.engine.waiting_queue import WaitingQueue
from asyncscale.params import Sampling

A, B, C = b"a", b"b", b"c"


def request(client: bytes, order: int, priority: int = 0) -> Request:
    return Request(client, order, np.zeros(1, np.int32), 1, Sampling(max_tokens=1), priority=priority, order=order)


def popped(queue: WaitingQueue, count: int) -> list[tuple[bytes, int]]:
    requests = [queue.pop() for _ in range(count)]
    return [(request.client, request.order) for request in requests]


def test_one_client_is_served_by_priority_and_arrival() -> None:
    queue = WaitingQueue()
    for order, priority in enumerate([1, 0, 1, 0, -1]):
        queue.push(request(A, order, priority))
    assert popped(queue, 5) == [(A, 4), (A, 1), (A, 3), (A, 0), (A, 2)]
    assert len(queue) == 0


def test_a_flood_does_not_delay_the_other_client() -> None:
    queue = WaitingQueue()
    for order in range(10_000):
        queue.push(request(A, order))
    popped(queue, 8)
    for order in range(3):
        queue.push(request(B, 20_000 + order))
    assert popped(queue, 4) == [(B, 20_000), (B, 20_001), (B, 20_002), (A, 8)]


def test_equal_floods_take_turns() -> None:
    queue = WaitingQueue()
    for order in range(6):
        queue.push(request(A, order))
    for order in range(6):
        queue.push(request(B, 6 + order))
    assert [client for client, _ in popped(queue, 6)] == [A, B] * 3


def test_a_better_priority_goes_first_whatever_its_client_has() -> None:
    queue = WaitingQueue()
    for order in range(4):
        queue.push(request(A, order, priority=-1))
    queue.push(request(B, 9))
    assert [client for client, _ in popped(queue, 5)] == [A, A, A, A, B]


def test_what_stopped_no_longer_counts() -> None:
    queue = WaitingQueue()
    first, second, third = (request(A, order) for order in range(3))
    for each in (first, second, third):
        queue.push(each)
    assert queue.pop() is first
    queue.push(request(B, 10))
    queue.stopped(first)
    assert queue.pop() is second  # both have none running; this one came first


def test_a_preempted_request_returns_to_the_front_of_its_client() -> None:
    queue = WaitingQueue()
    first, second = request(A, 0), request(A, 1)
    queue.push(first)
    queue.push(second)
    assert queue.pop() is first
    queue.stopped(first)
    queue.push(first)
    assert queue.first is first


@given(
    st.lists(
        st.tuples(st.sampled_from(["push", "pop", "discard", "stop"]), st.sampled_from([A, B, C]), st.integers(0, 2))
    )
)
def test_nobody_who_waits_has_more_running_than_one_who_was_passed_over(events: list[tuple[str, bytes, int]]) -> None:
    queue, waiting, running = WaitingQueue(), [], []
    for order, (event, client, priority) in enumerate(events):
        if event == "push":
            waiting.append(request(client, order, priority))
            queue.push(waiting[-1])
        elif event == "pop" and waiting:
            counts = Counter(each.client for each in running)
            chosen = queue.pop()
            best = min(waiting, key=lambda each: (each.priority, counts[each.client], each.order))
            assert chosen is best
            waiting.remove(chosen)
            running.append(chosen)
        elif event == "discard" and waiting:
            gone = waiting.pop(priority % len(waiting))
            queue.discard(gone)
            queue.discard(gone)
        elif event == "stop" and running:
            queue.stopped(running.pop(0))
        assert len(queue) == len(waiting)
