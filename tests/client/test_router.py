"""The router is pure: picks and reports in, decisions out, on a clock that the test sets. Named after the races that
users of other systems have met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncscale.client.policies import EngineLoad, RoutingRequest, least_tokens, round_robin
from asyncscale.client.router import Router
from asyncscale.messages import Load

ANY = RoutingRequest(num_prompt_tokens=10)


def make_router(num_engines: int, capacity: int = 1000, **options) -> Router:
    router = Router(**options)
    for engine_id in range(num_engines):
        router.join(engine_id, capacity)
    return router


def picked(router: Router, request: RoutingRequest = ANY, now: float = 0.0) -> int | None:
    decision = router.pick(request, now)
    return None if decision is None else decision.engine_id


def send(router: Router, request: RoutingRequest = ANY, now: float = 0.0) -> int:
    engine_id = picked(router, request, now)
    assert engine_id is not None
    router.sent(engine_id, 1, request.num_tokens)
    return engine_id


def report(version: int = 1, running: int = 0, waiting: int = 0, mine: int = 0, **fields) -> Load:
    """A load with 10 tokens per request, and a KV cache of 100 blocks."""
    tokens = {"tokens": 10 * (running + waiting), "my_tokens": 10 * mine, "used_blocks": 0, "num_blocks": 100}
    return Load(version, running, waiting, mine, **(tokens | fields))


def in_flight(router: Router) -> list[int]:
    return [load.in_flight for load in router.loads(0.0)]


def spread(counts: Sequence[int]) -> int:
    return max(counts) - min(counts)


# --- snapshots and what they must not do


@example(num_engines=2, events=[(0, 0, 100), None, None])
@given(
    num_engines=st.integers(1, 5),
    events=st.lists(st.none() | st.tuples(st.integers(0, 4), st.integers(0, 100), st.integers(0, 100)), max_size=60),
)
@pytest.mark.parametrize("policy", ["least-loaded", "least-tokens"])
def test_a_burst_of_one_client_is_spread_to_within_one_whatever_snapshots_arrive_meanwhile(
    policy: str, num_engines: int, events: list[tuple[int, int, int] | None]
) -> None:
    router = make_router(num_engines) if policy == "least-loaded" else make_router(num_engines, policy=least_tokens)
    for version, event in enumerate(events):
        if event is None:
            send(router)
        else:  # a snapshot that knows some of this client's requests, and nobody else's
            engine_id, known, used_blocks = event
            router.report(engine_id, report(version, running=known, mine=known, used_blocks=used_blocks), now=0.0)
        assert spread([load.mine for load in router.loads(0.0)]) <= 1


def test_snapshots_do_not_erase_local_increments() -> None:
    router = make_router(2)
    for version in range(20):  # after each send, both engines report what they knew before any of them
        send(router)
        router.report(0, report(version), now=0.0)
        router.report(1, report(version), now=0.0)
    assert in_flight(router) == [10, 10]


def test_a_snapshot_from_before_my_last_sends_does_not_erase_them() -> None:
    router = make_router(2)
    router.sent(0, 10)
    router.report(0, report(running=7, mine=4), now=0.0)
    assert in_flight(router) == [13, 0]
    assert send(router) == 1


def test_what_others_have_in_flight_is_the_total_less_what_the_report_says_is_mine() -> None:
    router = make_router(2)
    router.sent(0, 5, 500)
    router.report(0, report(running=6, waiting=2, mine=3, tokens=800, my_tokens=300), now=0.0)
    load = router.loads(0.0)[0]
    assert (load.mine, load.others, load.in_flight) == (5, 5, 10)
    assert (load.my_tokens, load.other_tokens, load.tokens) == (500, 500, 1000)


def test_a_report_that_arrives_out_of_order_is_ignored() -> None:
    router = make_router(1)
    router.report(0, report(version=7, running=9), now=1.0)
    router.report(0, report(version=6, running=1), now=2.0)
    assert router.loads(3.0)[0].running == 9
    assert router.loads(3.0)[0].age_s == 2.0


def test_a_report_of_the_same_version_says_what_else_has_changed_and_that_the_counts_still_hold() -> None:
    router = make_router(1)
    router.report(0, report(version=7, running=9, used_blocks=10), now=1.0)
    router.report(0, report(version=7, running=9, used_blocks=20), now=2.0)
    load = router.loads(3.0)[0]
    assert (load.kv_usage, load.age_s) == (0.2, 1.0)


def test_versions_order_the_reports_of_one_engine_and_not_those_of_different_engines() -> None:
    router = make_router(2)
    router.report(0, report(version=1_000, running=1), now=0.0)
    router.report(1, report(version=1, running=8), now=0.0)
    router.report(1, report(version=2, running=9), now=0.0)
    assert in_flight(router) == [1, 9]


@pytest.mark.parametrize("order", sorted(set(permutations("EECC"))))
def test_when_two_publishers_write_one_field_the_newest_version_stands_in_whatever_order_they_arrive(order) -> None:
    versions = {"E": iter((3, 5)), "C": iter((2, 4))}  # the engine itself, and the coordinator
    router = make_router(1)
    newest = 0
    for publisher in order:
        version = next(versions[publisher])
        newest = max(newest, version)
        router.report(0, report(version, running=version), now=0.0)
        assert router.loads(0.0)[0].running == newest


def test_counts_say_how_old_they_are() -> None:
    router = make_router(2)
    router.report(0, report(), now=3.0)
    assert [load.age_s for load in router.loads(5.0)] == [2.0, float("inf")]


# --- no favourites


def test_before_the_first_snapshot_requests_do_not_all_go_to_engine_zero() -> None:
    router = make_router(4)
    assert sorted(send(router) for _ in range(4)) == [0, 1, 2, 3]


def test_many_clients_without_a_snapshot_do_not_all_begin_with_engine_zero() -> None:
    first = [send(make_router(4, first_turn=turn)) for turn in range(100, 108)]
    assert Counter(first) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_ties_have_no_favourite() -> None:
    router = make_router(3)
    engine_ids = []
    for _ in range(30):
        engine_ids.append(send(router))
        router.ended(engine_ids[-1])
    assert Counter(engine_ids) == {0: 10, 1: 10, 2: 10}


@pytest.mark.parametrize("capacity", [1000, 50], ids=["busy", "full"])
def test_ties_have_no_favourite_beside_an_engine_that_is_out_of_the_question(capacity: int) -> None:
    router = make_router(3, capacity)
    router.report(1, report(running=50), now=0.0)
    engine_ids = []
    for _ in range(30):
        engine_ids.append(send(router))
        router.ended(engine_ids[-1])
    assert Counter(engine_ids) == {0: 15, 2: 15}


def test_kv_pressure_decides_between_equals() -> None:
    router = make_router(2)
    router.report(0, report(used_blocks=90), now=0.0)
    router.report(1, report(used_blocks=10), now=0.0)
    assert [picked(router) for _ in range(4)] == [1, 1, 1, 1]


def test_round_robin_takes_engines_in_turn_whatever_their_load() -> None:
    router = make_router(3, policy=round_robin)
    router.sent(0, 50)
    assert [send(router) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


# --- full engines


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


def test_an_overload_mark_clears_with_the_next_report() -> None:
    router = make_router(1, capacity=4)
    router.report(0, report(1, running=4, waiting=7), now=0.0)
    assert picked(router) is None
    router.report(0, report(2, running=3), now=0.1)
    assert picked(router, now=0.1) == 0


@pytest.mark.parametrize("age_s", [1.0, 1e6])
def test_a_stale_snapshot_is_used_as_it_is_because_engines_tell_every_change(age_s: float) -> None:
    router = make_router(2, capacity=4)
    router.report(0, report(1, running=4), now=0.0)
    router.report(1, report(1, running=3), now=0.0)
    assert send(router, now=age_s) == 1
    assert picked(router, now=age_s) is None
    assert [load.age_s for load in router.loads(age_s)] == [age_s, age_s]


# --- engines come, go, pause and drain


def test_engines_that_join_and_leave_between_two_picks_are_never_an_error() -> None:
    router = make_router(1)
    router.sent(0, 3, 30)
    router.leave(0)
    router.leave(0)
    assert picked(router) is None
    assert router.loads(0.0) == []
    router.report(0, report(running=5), now=0.0)
    router.sent(0, 1, 10)
    router.ended(0, 1, 10)
    router.computed(0, (1, 2))
    router.report(0, report(accepting=False), now=0.0)
    router.join(0, 10)
    load = router.loads(0.0)[0]
    assert (load.mine, load.others, load.my_tokens, load.accepting) == (0, 0, 0, True)
    assert router.cached_tokens((1, 2)) == {}
    assert picked(router) == 0


def test_an_engine_that_joins_is_used_at_once_and_in_its_place() -> None:
    router = make_router(1)
    router.join(7, 1000)
    router.join(3, 1000)
    assert sorted(send(router) for _ in range(3)) == [0, 3, 7]
    assert [load.engine_id for load in router.loads(0.0)] == [0, 3, 7]


def test_an_engine_that_comes_back_starts_with_no_counts_of_its_former_life() -> None:
    router = make_router(1)
    router.sent(0, 4, 40)
    router.report(0, report(version=900, running=4, mine=4), now=0.0)
    router.leave(0)
    router.join(0, 1000)
    router.ended(0, 4, 40)
    router.report(0, report(version=1, running=2), now=0.0)
    assert in_flight(router) == [2]


def test_an_engine_that_pauses_or_drains_gets_nothing_and_comes_back() -> None:
    router = make_router(2, capacity=100)
    router.sent(1, 10)
    router.report(0, report(1, accepting=False), now=0.0)
    assert [load.accepting for load in router.loads(0.0)] == [False, True]
    assert [send(router) for _ in range(3)] == [1, 1, 1]
    router.report(1, report(1, accepting=False), now=0.0)
    assert picked(router) is None  # held while none takes requests
    router.report(0, report(2, accepting=True), now=0.0)
    assert [send(router) for _ in range(3)] == [0, 0, 0]


def test_a_late_report_does_not_pause_an_engine_again() -> None:
    router = make_router(1)
    router.report(0, report(version=6), now=0.0)
    router.report(0, report(version=5, accepting=False), now=0.0)
    assert picked(router) == 0


@pytest.mark.parametrize("end", [lambda router: router.ended(0, 5, 50), lambda router: router.ended(0, 1, 99)])
def test_counts_never_fall_below_zero(end) -> None:
    router = make_router(1)
    router.sent(0, 1, 10)
    router.report(0, report(running=1, mine=3), now=0.0)  # the engine counts what this client took back since
    end(router)
    load = router.loads(0.0)[0]
    assert (load.mine, load.others, load.my_tokens, load.other_tokens) == (0, 0, 0, 0)


# --- what was decided


def test_a_decision_shows_the_score_of_every_engine_that_was_there() -> None:
    router = make_router(3, capacity=10)
    router.sent(0, 2)
    router.report(1, report(running=10, waiting=2, used_blocks=50), now=0.0)  # full
    router.report(2, report(accepting=False), now=0.0)
    decision = router.pick(ANY, now=0.0)
    assert decision is not None
    assert decision.engine_id == 0
    assert decision.scores == {0: 2.0, 1: 12 + 2 + 0.25, 2: 0.0}
    assert router.scores(0.0) == decision.scores


def test_a_decision_by_tokens_shows_tokens() -> None:
    router = make_router(2, policy=least_tokens)
    router.sent(0, 1, 700)
    router.report(1, report(running=3, tokens=500), now=0.0)
    decision = router.pick(ANY, now=0.0)
    assert decision is not None
    assert decision.engine_id == 1
    assert decision.scores == {0: 700, 1: 500}


def test_a_policy_of_the_users_own_sees_what_has_room_and_is_obeyed() -> None:
    seen = []

    def busiest(loads: Sequence[EngineLoad], request: RoutingRequest) -> EngineLoad:
        seen.append(([load.engine_id for load in loads], request))
        return max(loads, key=lambda load: load.in_flight)

    router = make_router(4, capacity=5, policy=busiest)
    router.sent(0, 5)
    router.sent(1, 3)
    router.report(2, report(accepting=False), now=0.0)
    request = RoutingRequest(10, 20, session="a", home=3, cached_tokens={3: 64})
    decision = router.pick(request, now=0.0)
    assert decision is not None
    assert (decision.engine_id, decision.scores) == (1, {0: 5, 1: 3, 2: 0, 3: 0})
    assert seen == [([1, 3], request)]


@pytest.mark.parametrize("answer", [None, 0, lambda loads: loads, lambda loads: EngineLoad(**vars_of(loads[0]))])
def test_a_policy_that_returns_something_else_is_named(answer) -> None:
    def mistaken(loads, request):
        return answer(loads) if callable(answer) else answer

    with pytest.raises(TypeError, match=r"mistaken must return one of the loads"):
        make_router(2, policy=mistaken).pick(ANY, now=0.0)


def vars_of(load: EngineLoad) -> dict[str, object]:
    return {name: getattr(load, name) for name in load.__struct_fields__}


# --- fair shares


def test_a_full_engine_still_takes_what_this_client_has_a_right_to() -> None:
    router = make_router(1, capacity=8)
    router.report(0, report(running=8, share=4), now=0.0)
    for _ in range(4):
        send(router)
    assert picked(router) is None


def test_a_free_slot_goes_before_a_right_to_wait() -> None:
    router = make_router(3, capacity=8, policy=round_robin)
    for engine_id, running in enumerate([8, 7, 8]):
        router.report(engine_id, report(running=running, share=4), now=0.0)
    assert send(router) == 1


def test_one_that_is_paused_takes_nothing_by_right() -> None:
    router = make_router(1, capacity=8)
    router.report(0, report(running=8, share=4, accepting=False), now=0.0)
    assert picked(router) is None


def test_who_is_alone_has_no_more_than_the_slots() -> None:
    router = make_router(1, capacity=8)
    router.report(0, report(share=8), now=0.0)
    for _ in range(8):
        send(router)
    assert picked(router) is None
