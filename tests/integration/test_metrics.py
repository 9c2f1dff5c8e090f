"""Metrics of real engines and clients: exact, the same from everybody, and never less than before."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncscale import (
    AsyncScaleClient,
    ClientStateError,
    EngineDeadError,
    EngineError,
    FrontendError,
    OverloadedError,
    RequestAbortedError,
    RequestTimeoutError,
    SimulatedModel,
    run_frontends,
)
from asyncscale.metrics import EngineMetrics, Metrics
from asyncscale.metrics.catalog import ENGINE_LAYOUT, REQUEST_LAYOUT

MODEL = SimulatedModel(base_ms=0.5, decode_us=1, prefill_us=0.1, faults={300: "error", 305: "hang"})
PROMPT = list(range(10))


async def generate(client: AsyncScaleClient, count: int, **options: Any) -> None:
    await asyncio.gather(*(client.generate(PROMPT, max_tokens=7, ignore_eos=True, **options) for _ in range(count)))


async def until(look: Callable[[], Any], condition: Callable[[Any], bool]) -> Any:
    """What is seen when the condition is met."""
    async with asyncio.timeout(20):
        while not condition(seen := look()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return seen


def ended(metrics: Metrics) -> dict[str, int]:
    return {reason: count for reason, count in metrics.requests.request_success.items() if count}


# --- one client


async def test_an_owner_sees_at_once_what_was_done() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2) as client:
        await generate(client, 20)
        metrics = client.metrics()
        assert metrics.model_name == "simulated"
        assert metrics.engines.keys() == {0, 1}
        assert metrics.all_engines.engine_up == 2
        assert (metrics.all_engines.prompt_tokens, metrics.all_engines.generation_tokens) == (200, 140)
        requests = metrics.requests
        assert ended(metrics) == {"length": 20}
        assert (requests.tokens_received, requests.request_generation_tokens.sum) == (140, 140)
        assert (requests.request_prompt_tokens.count, requests.request_prompt_tokens.sum) == (20, 200)
        assert requests.time_to_first_token_seconds.count == requests.request_held_time_seconds.count == 20
        assert requests.inter_token_latency_seconds.count == 20 * 6
        assert requests.request_time_per_output_token_seconds.count == 20
        assert requests.e2e_request_latency_seconds.count == requests.request_params_n.sum == 20
        for engine in (0, 1):
            part = metrics.requests_of(engine=engine)
            assert part.tokens_received == metrics.engines[engine].generation_tokens > 0
        assert metrics.clients[metrics.client_id] == requests
        phases = ("queue", "prefill", "decode", "inference")
        times = {phase: getattr(requests, f"request_{phase}_time_seconds") for phase in phases}
        assert [time.count for time in times.values()] == [20] * 4
        assert times["inference"].sum == pytest.approx(times["prefill"].sum + times["decode"].sum, abs=1e-4)
        held = requests.request_held_time_seconds.sum
        in_phases = held + times["queue"].sum + times["inference"].sum
        assert 0 < in_phases < requests.e2e_request_latency_seconds.sum  # the rest is messages on their way
        assert held + times["queue"].sum + times["prefill"].sum < requests.time_to_first_token_seconds.sum


async def test_times_between_tokens_add_up_to_the_time_from_first_to_last() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        completions = await asyncio.gather(
            *(client.generate(PROMPT, max_tokens=10 + 5 * i, ignore_eos=True) for i in range(20))
        )
        durations = [c.timing.last_token - c.timing.first_token for c in completions]  # type: ignore[operator]
        between = client.metrics().requests.inter_token_latency_seconds
        assert between.count == sum(len(c.token_ids) - 1 for c in completions)
        assert between.sum == pytest.approx(sum(durations), abs=between.count * 1e-6)


async def test_guessed_tokens_come_together() -> None:
    model = SimulatedModel(base_ms=0.5, output_period=4)
    async with AsyncScaleClient(model, num_engines=1, speculation="ngram") as client:
        completion = await client.generate(PROMPT, max_tokens=100, ignore_eos=True)
        requests, engine = client.metrics().requests, client.metrics().engines[0]
        assert engine.spec_decode_num_accepted_tokens > 0
        assert requests.tokens_received == engine.generation_tokens == 100
        assert requests.inter_token_latency_seconds.count == 99 - engine.spec_decode_num_accepted_tokens
        duration = completion.timing.last_token - completion.timing.first_token  # type: ignore[operator]
        assert requests.inter_token_latency_seconds.sum == pytest.approx(duration, abs=1e-4)


async def test_every_ending_has_its_name() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, max_num_seqs=4, max_queued_requests=2) as client:
        text = (await client.generate(PROMPT, max_tokens=8, ignore_eos=True, temperature=0)).text
        await client.generate(PROMPT, max_tokens=8, ignore_eos=True, temperature=0, stop=text[3:5])
        await client.generate(PROMPT, max_tokens=8, ignore_eos=True, n=3)
        with pytest.raises(RequestTimeoutError):
            await client.generate(PROMPT, max_tokens=8000, ignore_eos=True, timeout=0.05)
        with pytest.raises(EngineError, match="asked the simulated model"):
            await client.generate([300], max_tokens=8)
        running = [client.generate(PROMPT, max_tokens=8000, ignore_eos=True) for _ in range(4)]
        held = [client.generate(PROMPT, max_tokens=8000, ignore_eos=True) for _ in range(2)]
        assert client.metrics().requests.num_requests_held == 2
        for _ in range(3):
            with pytest.raises(OverloadedError):
                client.generate(PROMPT)
        held[0].abort()
        with pytest.raises(RequestAbortedError):
            await held[0]
        metrics = client.metrics()
        assert ended(metrics) == {"length": 2, "stop": 1, "timeout": 1, "error": 1, "abort": 1}
        assert (metrics.requests.num_requests_held, metrics.requests.admission_rejections) == (1, 3)
        assert metrics.requests.request_params_n.sum == 2 + 1 + 3 + 2
        assert sum(metrics.requests_of(engine=0).request_success.values()) == 5  # no engine had the one that was held
        assert len(running) == 4


async def test_a_client_that_is_not_started_or_closed_has_no_metrics() -> None:
    client = AsyncScaleClient(MODEL, num_engines=1)
    with pytest.raises(ClientStateError):
        client.metrics()
    async with client:
        metrics = await client.metrics()
        assert (await metrics).engines == metrics.engines
    with pytest.raises(ClientStateError):
        client.metrics()
    with pytest.raises(ClientStateError):
        await metrics


async def test_any_thread_may_look() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2) as owner, AsyncScaleClient.attach(owner.address) as other:
        seen: list[Metrics] = []

        def look() -> None:
            while not seen or other.metrics().all_engines.generation_tokens < 700:
                seen.append(owner.metrics())

        thread = threading.Thread(target=look)
        thread.start()
        await generate(owner, 100)
        await asyncio.to_thread(thread.join)
        totals = [metrics.all_engines.generation_tokens for metrics in seen]
        assert totals == sorted(totals)


async def test_the_cache_is_seen_from_engine_and_client_alike() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        assert client.metrics().requests.cache_hit_rate is None
        assert client.metrics().engines[0].cache_hit_rate is None
        for _ in range(4):
            await client.generate(list(range(40)), max_tokens=1)
        metrics = client.metrics()
        assert metrics.requests.cache_hit_rate == metrics.engines[0].cache_hit_rate == 3 * 32 / 160


# --- several clients


async def work(client: AsyncScaleClient, index: int) -> str:
    await generate(client, 10 * (index + 1))
    return client.metrics().client_id  # and it leaves at once, sooner than it would report


async def test_every_client_sees_the_same() -> None:
    async with (
        AsyncScaleClient(MODEL, num_engines=2) as owner,
        AsyncScaleClient.attach(owner.address) as first,
        AsyncScaleClient.attach(owner.address) as second,
    ):
        for number, client in enumerate((owner, first, second), start=1):
            await generate(client, number)
        seen = [await client.metrics() for client in (owner, first, second)]
        assert seen[0] == seen[1] == seen[2]
        assert len({metrics.client_id for metrics in seen}) == 3
        assert [metrics.clients[metrics.client_id].tokens_received for metrics in seen] == [7, 14, 21]
        assert (seen[0].requests.tokens_received, seen[0].all_engines.generation_tokens) == (42, 42)
        assert ended(seen[0]) == {"length": 6}


async def test_clients_of_other_processes_count_also_when_they_have_left() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2) as owner:
        first, second = await run_frontends(work, 2, owner.address)
        metrics = await until(owner.metrics, lambda metrics: len(metrics.clients) == 2)
        assert metrics.clients.keys() == {metrics.client_id, "departed"}
        assert not {first, second} & metrics.clients.keys()
        assert metrics.clients["departed"].tokens_received == metrics.all_engines.generation_tokens == 210
        assert ended(metrics) == {"length": 30}


async def test_who_looks_again_and_again_sees_news_without_asking() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2) as owner, AsyncScaleClient.attach(owner.address) as client:
        await generate(owner, 3)
        await until(client.metrics, lambda metrics: metrics.all_engines.generation_tokens == 21)
        await generate(owner, 3)
        seen = await until(client.metrics, lambda metrics: metrics.requests.tokens_received == 42)
        assert seen == await owner.metrics()
        await generate(client, 1)
        assert client.metrics().clients[seen.client_id].tokens_received == 7  # its own it knows at once


async def test_a_client_that_is_gone_counts_with_what_it_said_last(tmp_path: Path) -> None:
    async def stay(client: AsyncScaleClient, index: int) -> None:
        await client.generate(PROMPT, max_tokens=7, ignore_eos=True)
        (tmp_path / "pid").write_text(str(os.getpid()))
        await asyncio.Event().wait()

    async with AsyncScaleClient(MODEL, num_engines=1) as owner:
        front_end = asyncio.ensure_future(run_frontends(stay, 1, owner.address))
        (tmp_path / "pid").touch()
        pid = int(await until((tmp_path / "pid").read_text, bool))
        assert (await owner.metrics()).requests.tokens_received == 7
        os.kill(pid, signal.SIGSTOP)
        assert (await owner.metrics()).requests.tokens_received == 7  # it cannot say anything
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(FrontendError):
            await front_end
        metrics = await until(owner.metrics, lambda metrics: len(metrics.clients) == 2)
        assert metrics.clients["departed"].tokens_received == metrics.requests.tokens_received == 7
        assert ended(metrics) == {"length": 1}


# --- deaths


def never_less(earlier: Metrics, later: Metrics) -> None:
    """No counter has fallen, of no engine and not over all."""
    pairs: list[tuple[Any, Any]] = [(engine, later.engines[key]) for key, engine in earlier.engines.items()]
    for before, after in [*pairs, (earlier.requests, later.requests)]:
        layout = ENGINE_LAYOUT if isinstance(before, EngineMetrics) else REQUEST_LAYOUT
        for metric in layout.metrics:
            old, new = getattr(before, metric.name), getattr(after, metric.name)
            if metric.kind == "histogram":
                assert new.sum >= old.sum, metric.name
                assert all(n >= o for n, o in zip(new.counts, old.counts, strict=True)), metric.name
            elif metric.values:
                assert all(new[value] >= old[value] for value in metric.values), metric.name
            elif metric.kind == "counter":
                assert new >= old, metric.name


async def watch(look: Callable[[], Metrics], seen: list[Metrics]) -> None:
    while True:
        seen.append(look())
        if len(seen) > 1:
            never_less(seen[-2], seen[-1])
        await asyncio.sleep(0.005)


async def test_engines_that_are_killed_under_load_lose_no_count() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2) as owner, AsyncScaleClient.attach(owner.address) as other:
        watchers = [asyncio.ensure_future(watch(client.metrics, [])) for client in (owner, other)]
        for _ in range(2):
            load = [client.generate(PROMPT, max_tokens=300, ignore_eos=True) for client in (owner, other) * 20]
            await until(owner.metrics, lambda metrics: metrics.engines[0].num_requests_running > 5)
            before = owner.metrics().engines[0].generation_tokens
            os.kill(owner._engines.supervisor.engines[0].pid, signal.SIGKILL)  # type: ignore[attr-defined]
            seen = await until(owner.metrics, lambda metrics: not metrics.engines[0].engine_up)
            assert (seen.engines[0].num_requests_running, seen.engines[0].kv_cache_usage_perc) == (0, 0.0)
            assert seen.engines[0].generation_tokens >= before
            await asyncio.gather(*load)
            await until(owner.metrics, lambda metrics: metrics.engines[0].engine_up)
        seen = await owner.metrics()
        assert (seen.engines[0].engine_deaths, seen.engines[0].engine_hangs, seen.engines[1].engine_deaths) == (2, 0, 0)
        assert ended(seen) == {"length": 80}
        assert seen.requests.tokens_received == seen.requests.request_generation_tokens.sum == 80 * 300
        assert seen.all_engines.generation_tokens >= 80 * 300  # what died with an engine was made twice
        assert seen.requests.request_moves > 0
        assert seen == await other.metrics()
        for watcher in watchers:
            assert not watcher.done(), watcher.exception()
            watcher.cancel()


async def test_an_engine_that_hangs_can_be_looked_at_and_is_counted() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, hang_timeout=0.5) as client:
        await generate(client, 2)
        hanging = client.generate([305], max_tokens=5)
        seen = await until(client.metrics, lambda metrics: metrics.engines[0].num_requests_running == 1)
        assert (seen.engines[0].generation_tokens, seen.engines[0].engine_up) == (14, 1)
        with pytest.raises(EngineDeadError):
            await hanging
        seen = await until(client.metrics, lambda metrics: metrics.engines[0].engine_hangs == 2)
        assert (seen.engines[0].generation_tokens, seen.engines[0].engine_deaths) == (14, 2)


async def test_when_the_owner_is_gone_its_last_counts_are_left() -> None:
    owner = await AsyncScaleClient(MODEL, num_engines=1).start()
    async with AsyncScaleClient.attach(owner.address) as client:
        await generate(client, 2)
        await client.metrics()
        await owner.close()
        metrics = await until(client.metrics, lambda metrics: not metrics.engines[0].engine_up)
        assert (metrics.engines[0].generation_tokens, metrics.requests.tokens_received) == (14, 14)
        assert (await client.metrics()).engines == metrics.engines
