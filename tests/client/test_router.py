"""The router is pure: a burst of picks and reports in, decisions out, on a clock that the test sets."""

from __future__ import annotations

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from asyncscale.client.policies import AFFINITY_SLACK, RoutingRequest, round_robin
from asyncscale.client.router import Router
from asyncscale.messages import Load

ANY = RoutingRequest(num_prompt_tokens=10)


def make_router(num_engines: int, capacity: int = 1000) -> Router:
    router = Router()
    for engine_id in range(num_engines):
        router.join(engine_id, capacity)
    return router


def send(router: Router, request: RoutingRequest = ANY) -> int:
    request = msgspec.structs.replace(request, home=router.home(request.session))
    decision = router.pick(request, now=0.0)
    assert decision is not None
    router.sent(decision.engine_id, 1, request.num_tokens)
    return decision.engine_id


def picked(router: Router, request: RoutingRequest = ANY, now: float = 0.0) -> int | None:
    decision = router.pick(request, now)
    return None if decision is None else decision.engine_id


def report(version: int = 1, running: int = 0, waiting: int = 0, mine: int = 0, used_blocks: int = 0) -> Load:
    return Load(version, running, waiting, mine, 0, 0, used_blocks, 100)


def spread(router: Router) -> int:
    counts = [load.mine for load in router.loads(0.0)]
    return max(counts) - min(counts)


@example(num_engines=2, events=[(0, 0, 100), None, None])
@given(
    num_engines=st.integers(1, 5),
    events=st.lists(st.none() | st.tuples(st.integers(0, 4), st.integers(0, 100), st.integers(0, 100)), max_size=60),
)
def test_a_burst_of_one_client_is_spread_to_within_one_whatever_snapshots_arrive_meanwhile(
    num_engines: int, events: list[tuple[int, int, int] | None]
) -> None:
    router = make_router(num_engines)
    for version, event in enumerate(events):
        if event is None:
            send(router)
        else:  # a snapshot that knows some of this client's requests, and nobody else's
            engine_id, known, used_blocks = event
            router.report(engine_id, report(version, running=known, mine=known, used_blocks=used_blocks), now=0.0)
        assert spread(router) <= 1


def test_a_snapshot_from_before_my_sends_does_not_erase_them() -> None:
    router = make_router(2)
    router.sent(0, 10)
    router.report(0, report(running=0, mine=0), now=0.0)
    assert send(router) == 1
    assert [load.in_flight for load in router.loads(0.0)] == [10, 1]


def test_before_the_first_snapshot_requests_do_not_all_go_to_engine_zero() -> None:
    router = make_router(4)
    assert sorted(send(router) for _ in range(4)) == [0, 1, 2, 3]


def test_what_others_have_in_flight_is_the_total_less_what_the_report_says_is_mine() -> None:
    router = make_router(2)
    router.sent(0, 5)
    router.report(0, report(running=6, waiting=2, mine=3), now=0.0)
    assert router.loads(0.0)[0].others == 5
    assert router.loads(0.0)[0].in_flight == 10


def test_a_report_that_arrives_out_of_order_is_ignored() -> None:
    router = make_router(1)
    router.report(0, report(version=7, running=9), now=1.0)
    router.report(0, report(version=6, running=1), now=2.0)
    assert router.loads(3.0)[0].running == 9
    assert router.loads(3.0)[0].age_s == 2.0


def test_ties_have_no_favourite() -> None:
    router = make_router(3)
    engine_ids = []
    for _ in range(30):
        engine_ids.append(send(router))
        router.ended(engine_ids[-1])
    assert {engine_ids.count(engine_id) for engine_id in range(3)} == {10}


def test_a_full_engine_gets_nothing_while_another_has_room() -> None:
    router = make_router(2, capacity=4)
    router.report(0, report(running=4), now=0.0)
    assert [send(router) for _ in range(4)] == [1, 1, 1, 1]


def test_when_every_engine_is_full_the_request_is_held_until_one_is_not() -> None:
    router = make_router(2, capacity=1)
    send(router)
    send(router)
    assert picked(router) is None
    router.ended(1)
    assert picked(router) == 1


def test_kv_pressure_decides_between_equals() -> None:
    router = make_router(2)
    router.report(0, report(used_blocks=90), now=0.0)
    router.report(1, report(used_blocks=10), now=0.0)
    assert picked(router) == 1


def test_a_session_stays_on_its_engine_until_that_is_busier_by_more_than_the_slack() -> None:
    router = make_router(2)
    session = RoutingRequest(num_prompt_tokens=10, session="a")
    home = send(router, session)
    for _ in range(AFFINITY_SLACK - 1):
        assert send(router, session) == home
    router.sent(home, 2)
    assert send(router, session) == 1 - home


def test_engines_that_join_and_leave_between_picks_are_never_an_error() -> None:
    router = make_router(1)
    router.sent(0, 3)
    router.leave(0)
    router.leave(0)
    assert picked(router) is None
    router.report(0, report(running=5), now=0.0)
    router.sent(0)
    router.ended(0)
    router.join(0, 10)
    assert router.loads(0.0)[0].mine == 0
    assert picked(router) == 0


def test_without_a_report_the_age_of_the_counts_is_infinite() -> None:
    assert make_router(1).loads(5.0)[0].age_s == float("inf")


def test_round_robin_takes_engines_in_turn_whatever_their_load() -> None:
    router = Router(round_robin)
    router.join(0, 100)
    router.join(1, 100)
    router.sent(0, 50)
    assert sorted(send(router) for _ in range(4)) == [0, 0, 1, 1]
