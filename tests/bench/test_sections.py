"""The parts of `scale`: their arithmetic, and their front ends' work on a client of this process."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from asyncscale import AsyncScaleClient, EngineLoad, SimulatedModel
from asyncscale.bench.sections import many, seed, serve, throughput
from asyncscale.bench.sections.freshness import Moment, lags
from asyncscale.bench.sections.settings import Settings, deal, trace
from asyncscale.bench.table import Row


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client() -> AsyncIterator[AsyncScaleClient]:
    async with AsyncScaleClient(SimulatedModel(base_ms=0.5, decode_us=1), num_engines=2) as client:
        yield client


async def pass_gate() -> float:
    return time.monotonic()


def test_every_request_is_dealt_to_one_client_in_turn() -> None:
    requests = trace(10, 100.0)
    shares = [deal(requests, 3, index) for index in range(3)]
    assert shares[1] == [requests[1], requests[4], requests[7]]
    assert sorted((r for share in shares for r in share), key=lambda r: r.arrival_s) == requests


def test_every_process_makes_the_same_trace_and_a_part_of_it_is_its_beginning() -> None:
    assert trace(20, 50.0)[:5] == trace(5, 50.0)


def test_a_fraction_is_of_counts_and_of_durations_and_never_nothing() -> None:
    quick = Settings(1 / 8)
    assert (quick.count(2000), quick.count(3), quick.seconds(4.0)) == (250, 1, 0.5)
    assert (Settings().count(2000), Settings().seconds(4.0)) == (2000, 4.0)


# --- freshness


def test_a_change_is_seen_when_its_count_or_a_later_one_of_its_engine_is() -> None:
    changes = [Moment(1.0, 0, 10), Moment(1.1, 1, 10), Moment(1.2, 0, 30), Moment(1.3, 0, 20), Moment(1.4, 0, 50)]
    sights = [
        Moment(0.9, 0, 0),
        Moment(1.01, 0, 10),
        Moment(1.02, 0, 10),
        Moment(1.15, 1, 10),
        Moment(1.35, 0, 20),  # 30 was never seen by itself
        Moment(1.36, 0, 17),
    ]
    assert lags(changes, sights) == pytest.approx([0.01, 0.05, 0.15, 0.05, math.inf])


def test_what_another_engine_has_is_no_sight_of_a_change() -> None:
    assert lags([Moment(1.0, 0, 10)], [Moment(1.1, 1, 10)]) == [math.inf]


# --- what front ends do


@pytest.mark.asyncio(loop_scope="module")
async def test_a_share_of_the_seed_is_played_to_its_last_token(client: AsyncScaleClient) -> None:
    shares = [await seed.play_share(8, math.inf, 2, pass_gate, client, index) for index in range(2)]
    wanted = [request.sampling["max_tokens"] for request in trace(8, math.inf)]
    assert [share.num_tokens for share in shares] == [sum(wanted[0::2]), sum(wanted[1::2])]
    assert [share.num_failed for share in shares] == [0, 0]
    for share in shares:
        assert len(share.ttft_s) == len(share.tpot_s) == 4
        assert 0 < max(share.ttft_s) <= share.duration_s
        assert share.cpu_s > 0


@pytest.mark.asyncio(loop_scope="module")
async def test_a_delivery_counts_what_was_read(client: AsyncScaleClient) -> None:
    delivery = await throughput.drink(5, 40, pass_gate, client, 0)
    assert delivery.num_tokens == 5 * 40
    assert len(delivery.pauses_s) == 5
    assert 0 < sum(delivery.pauses_s) / 5 * 39 <= delivery.duration_s


@pytest.mark.asyncio(loop_scope="module")
async def test_who_has_played_watches_until_no_engine_has_anything_to_do(client: AsyncScaleClient) -> None:
    other = client.generate("another client's", max_tokens=200, ignore_eos=True)
    passed = []

    async def second_pass_waits_for_the_other() -> float:
        if passed:
            await other
        passed.append(time.monotonic())
        return passed[-1]

    sight = await many.play_and_watch(16, second_pass_waits_for_the_other, client, 0)
    assert sight.num_done == 2
    assert max(sight.last_token_at, passed[0]) < sight.zero_since < time.monotonic()


class Tables:
    """In place of a client: its tables of loads, one after the other, each with what one engine has to do."""

    def __init__(self, *running: int) -> None:
        self._running = running
        self.shown_at: list[float] = []

    async def watch_loads(self) -> AsyncIterator[tuple[EngineLoad, ...]]:
        for running in self._running:
            self.shown_at.append(time.monotonic())
            idle = EngineLoad(engine_id=0, mine=0, others=0, capacity=8)
            yield idle, EngineLoad(engine_id=1, mine=0, others=0, capacity=8, running=running)


async def test_loads_are_zero_since_they_were_so_for_good() -> None:
    tables = Tables(2, 0, 0, 1, 0, 0)
    watch = many.LoadWatch()
    await watch.run(tables)  # type: ignore[arg-type]
    assert tables.shown_at[4] <= await watch.wait_zero() <= tables.shown_at[5]


# --- rows


def seed_row(num_clients: int, throughput: float, tpot: float) -> Row:
    figures = {
        "num_engines": 1,
        "num_clients": num_clients,
        "rate": None,
        "output_throughput": throughput,
        "tpot_mean_ms": tpot,
    }
    return Row("seed", "", figures, "")


@pytest.mark.parametrize(("throughput", "tpot", "met"), [(990, 40.4, True), (900, 40, False), (1000, 42, False)])
def test_a_second_client_is_held_against_the_first_one_alone(throughput: float, tpot: float, met: bool) -> None:
    row = seed._second_client([seed_row(1, 1000, 40), seed_row(2, throughput, tpot)])
    assert row.met is met


async def test_a_small_run_of_serve_gives_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "trace", lambda num_requests, rate: trace(num_requests, rate, mean_out=20))
    cpu, ttft, tpot, lost = await serve.measure(Settings(1 / 100))
    figures = {**cpu.figures, **ttft.figures, **tpot.figures, **lost.figures}
    assert (figures["completed"], figures["lost"], lost.met) == (20, 0, True)
    assert all(value is not None and value > 0 for name, value in figures.items() if name != "lost")
    assert 0.9 < (figures["step_ratio"] or 0) < 3
