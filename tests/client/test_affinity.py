"""Sessions and shared prompt beginnings: they stay where their past is cached, as long as that costs little."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncscale.client import affinity
from asyncscale.client.affinity import CHUNK_TOKENS, PrefixTable, SessionTable, prefix_hashes
from asyncscale.client.policies import AFFINITY_SLACK, RoutingRequest, least_tokens
from asyncscale.client.router import Router
from asyncscale.messages import Load

PROMPT = array("i", range(3 * CHUNK_TOKENS + 5))


def make_router(num_engines: int, capacity: int = 1000, **options) -> Router:
    router = Router(**options)
    for engine_id in range(num_engines):
        router.join(engine_id, capacity)
    return router


def send(router: Router, prompt=PROMPT, session: str | None = None) -> int:
    hashes = prefix_hashes(prompt)
    request = RoutingRequest(len(prompt), 0, session, router.home(session), router.cached_tokens(hashes))
    decision = router.pick(request, now=0.0)
    assert decision is not None
    router.sent(decision.engine_id, 1, request.num_tokens)
    return decision.engine_id


def end(router: Router, engine_id: int, count: int = 1) -> None:
    router.ended(engine_id, count, count * len(PROMPT))


def spread(router: Router) -> int:
    counts = [load.mine for load in router.loads(0.0)]
    return max(counts) - min(counts)


# --- hashes


@given(length=st.integers(0, 300), change_at=st.integers(0, 299))
def test_a_hash_covers_all_tokens_up_to_the_end_of_its_chunk(length: int, change_at: int) -> None:
    token_ids = array("i", range(length))
    hashes = prefix_hashes(token_ids)
    assert len(hashes) == length // CHUNK_TOKENS
    if change_at < length:
        token_ids[change_at] += 1_000
        same = [before == after for before, after in zip(hashes, prefix_hashes(token_ids), strict=True)]
        assert same == [end <= change_at for end in range(CHUNK_TOKENS, length + 1, CHUNK_TOKENS)]


def test_the_hash_of_a_slice_is_that_of_its_tokens() -> None:
    assert prefix_hashes(array("i", range(200))[::2]) == prefix_hashes(array("i", range(0, 200, 2)))


# --- tables


def test_each_engine_counts_the_leading_chunks_that_it_computed() -> None:
    table = PrefixTable()
    table.computed(0, (1, 2, 3))
    table.computed(1, (1,))
    table.computed(2, (9,))
    assert table.cached_tokens((1, 2, 4)) == {0: 2 * CHUNK_TOKENS, 1: CHUNK_TOKENS}
    assert table.cached_tokens((2, 3)) == {0: 2 * CHUNK_TOKENS}
    assert table.cached_tokens((9, 2, 3)) == {2: CHUNK_TOKENS}
    assert table.cached_tokens(()) == {}


def test_the_chunks_used_last_are_kept_and_beginnings_outlive_what_follows_them(monkeypatch) -> None:
    monkeypatch.setattr(affinity, "_MAX_CHUNKS", 4)
    table = PrefixTable()
    table.computed(0, (1, 2, 3))
    table.computed(0, (1, 20))
    assert table.cached_tokens((1, 2, 3)) == {0: 3 * CHUNK_TOKENS}
    table.computed(0, (7,))
    assert table.num_chunks(0) == 4
    assert table.cached_tokens((1, 2, 3)) == {0: 2 * CHUNK_TOKENS}
    assert table.cached_tokens((1, 20)) == {0: 2 * CHUNK_TOKENS}
    table.computed(0, (1, 20))
    table.computed(0, (8,))
    table.computed(0, (9,))
    assert table.cached_tokens((1, 20)) == {0: 2 * CHUNK_TOKENS}
    assert table.cached_tokens((7,)) == {}
    table.computed(1, (7,))
    assert table.num_chunks(0) == 4  # each engine has a cache of its own


def test_the_sessions_used_last_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(affinity, "_MAX_SESSIONS", 2)
    table = SessionTable()
    for session in ("a", "b", "a", "c"):
        table.settle(session, 0)
    assert [table.home(session) for session in "abc"] == [0, None, 0]
    assert len(table) == 2


# --- routing


def test_a_session_stays_on_its_engine_leaves_it_beyond_the_slack_and_has_a_new_home_then() -> None:
    router = make_router(2)
    home = send(router, session="a")
    router.sent(home, AFFINITY_SLACK - 1)
    assert send(router, session="a") == home  # exactly the slack
    assert send(router, session="a") == 1 - home
    assert send(router, session="b") == 1 - home
    end(router, home, 5)
    assert send(router, session="a") == 1 - home  # the newest of its past is there
    router.sent(1 - home, 10)
    assert send(router, session="a") == home


def test_a_prompt_stays_where_its_beginning_is_cached_leaves_beyond_the_slack_and_comes_back() -> None:
    router = make_router(3)
    router.computed(1, prefix_hashes(PROMPT))
    assert [send(router) for _ in range(AFFINITY_SLACK + 1)] == [1] * (AFFINITY_SLACK + 1)
    assert send(router) != 1
    end(router, 1)
    assert send(router) == 1


def test_the_longest_cached_beginning_wins_and_among_equals_the_least_load() -> None:
    router = make_router(4)
    hashes = prefix_hashes(PROMPT)
    router.computed(0, hashes[:1])
    router.computed(1, hashes)
    router.computed(2, hashes)
    router.sent(1, 2)
    assert send(router) == 2


def test_less_than_a_chunk_in_common_changes_nothing() -> None:
    router = make_router(2)
    router.computed(0, prefix_hashes(PROMPT))
    router.sent(0, 1)
    assert send(router, PROMPT[: CHUNK_TOKENS - 1]) == 1


@pytest.mark.parametrize("policy", ["least-loaded", "least-tokens"])
def test_a_burst_of_identical_cold_prompts_is_spread_to_within_one(policy: str) -> None:
    router = make_router(4) if policy == "least-loaded" else make_router(4, policy=least_tokens)
    for _ in range(50):
        send(router)
        assert spread(router) <= 1


@given(st.lists(st.none() | st.integers(0, 3), max_size=60))
def test_a_burst_of_identical_prompts_is_spread_to_within_the_slack_whatever_is_computed_meanwhile(events) -> None:
    router = make_router(4)
    for event in events:
        if event is None:
            send(router)
        else:
            router.computed(event, prefix_hashes(PROMPT))
        assert spread(router) <= AFFINITY_SLACK + 1


@pytest.mark.parametrize("closed", ["full", "draining", "gone"])
def test_neither_a_session_nor_a_prompt_goes_to_an_engine_that_takes_nothing(closed: str) -> None:
    router = make_router(2, capacity=2)
    home = send(router, session="a")
    router.computed(home, prefix_hashes(PROMPT))
    if closed == "full":
        router.sent(home, 1)
    elif closed == "draining":
        router.report(home, Load(1, 1, 0, 1, 0, 0, 0, 100, accepting=False), now=0.0)
    else:
        router.leave(home)
    assert send(router, session="a") == 1 - home


def test_an_engine_that_comes_back_has_nothing_cached() -> None:
    router = make_router(2)
    home = send(router, session="a")
    router.computed(home, prefix_hashes(PROMPT))
    router.leave(home)
    router.join(home, 1000)
    assert router.home("a") is None
    assert router.cached_tokens(prefix_hashes(PROMPT)) == {}


# --- a request count is not work


def test_long_and_short_requests_are_balanced_in_tokens_where_by_count_they_are_not() -> None:
    sizes = [2000, 20] * 50  # by count, every other one is long: all long ones on one engine

    def tokens(router: Router) -> list[int]:
        for size in sizes:
            request = RoutingRequest(size)
            decision = router.pick(request, now=0.0)
            assert decision is not None
            router.sent(decision.engine_id, 1, request.num_tokens)
        return [load.tokens for load in router.loads(0.0)]

    by_tokens, by_count = tokens(make_router(2, policy=least_tokens)), tokens(make_router(2))
    assert max(by_tokens) - min(by_tokens) <= 2000
    assert by_count == [100_000, 1_000]


def test_by_tokens_a_cached_past_is_worth_four_requests_of_the_same_size() -> None:
    router = make_router(2, policy=least_tokens)
    router.computed(0, prefix_hashes(PROMPT))
    router.sent(0, 1, AFFINITY_SLACK * len(PROMPT))
    assert send(router) == 0
    assert send(router) == 1
