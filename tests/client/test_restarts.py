from __future__ import annotations

from asyncscale.client.restarts import RestartHistory


def test_after_a_good_life_it_is_started_at_once_however_often() -> None:
    history = RestartHistory(max_restarts=1)
    assert [history.died(3600.0, 0.3) for _ in range(100)] == [0.0] * 100


def test_short_lives_are_followed_by_growing_delays_and_then_by_none() -> None:
    history = RestartHistory(max_restarts=4)
    assert [history.died(0.1, 0.3) for _ in range(6)] == [0.0, 0.1, 0.2, 0.4, None, None]


def test_a_good_life_makes_up_for_the_short_ones_before() -> None:
    history = RestartHistory(max_restarts=4)
    for _ in range(3):
        history.died(0.0, 0.3)
    assert history.died(60.0, 0.3) == 0.0
    assert [history.died(0.0, 0.3) for _ in range(5)] == [0.0, 0.1, 0.2, 0.4, None]


def test_delays_are_bounded() -> None:
    history = RestartHistory(max_restarts=10_000)
    delays = [history.died(0.0, 0.3) for _ in range(5000)]
    assert max(delay for delay in delays if delay is not None) == 30.0


def test_none_at_all() -> None:
    assert RestartHistory(max_restarts=0).died(3600.0, 0.3) is None


def test_a_life_is_good_when_it_was_longer_than_twice_its_start() -> None:
    history = RestartHistory(max_restarts=3)
    assert [history.died(15.0, start_s=10.0) for _ in range(4)] == [0.0, 0.1, 0.2, None]
    assert history.died(25.0, start_s=10.0) == 0.0
