"""What Prometheus scrapes: parsed as it does, compared with what was done, through deaths of engines and clients."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from asyncscale import AsyncScaleClient, FrontendError, SimulatedModel, blocking, run_frontends
from asyncscale.metrics import AsyncScaleCollector
from asyncscale.metrics.catalog import ENGINE_LAYOUT, REQUEST_LAYOUT
from asyncscale.testing import kill_engine, wait_until

MODEL = SimulatedModel(base_ms=0.5, decode_us=1, prefill_us=0.1)
PROMPT = list(range(10))

# name and labels -> value
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def registry_of(*collectors: AsyncScaleCollector) -> CollectorRegistry:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return registry


def parse(text: str) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples, f"{key} is there twice"
            samples[key] = sample.value
    return samples


def scrape(client: AsyncScaleClient, *, per_client: bool = False) -> Samples:
    """In this very thread, which is that of the event loop."""
    collector = AsyncScaleCollector(client, per_client=per_client)
    return parse(generate_latest(registry_of(collector)).decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    """Of all series of that name with these labels together."""
    found = [v for (n, have), v in samples.items() if n == f"asyncscale:{name}" and labels.items() <= set(have)]
    assert found, f"there is no {name} with {labels}"
    return sum(found)


def labels_of(samples: Samples, name: str) -> set[str]:
    return {label for (n, have), _ in samples.items() if n == f"asyncscale:{name}" for label, _ in have}


async def generate(client: AsyncScaleClient, count: int, max_tokens: int = 7) -> None:
    await asyncio.gather(*(client.generate(PROMPT, max_tokens=max_tokens, ignore_eos=True) for _ in range(count)))


async def test_a_scrape_says_what_was_done() -> None:
    async with AsyncScaleClient(MODEL, num_engines=2) as client:
        assert value(scrape(client), "request_success_total", engine="1", finished_reason="length") == 0
        await generate(client, 20)
        samples = scrape(client)
        assert value(samples, "generation_tokens_total") == value(samples, "tokens_received_total") == 140
        assert value(samples, "prompt_tokens_total") == value(samples, "request_prompt_tokens_sum") == 200
        assert value(samples, "request_success_total", finished_reason="length") == 20
        assert value(samples, "inter_token_latency_seconds_count") == 120
        assert value(samples, "inter_token_latency_seconds_bucket", le="+Inf") == 120
        assert value(samples, "request_generation_tokens_bucket", le="5.0") == 0
        assert value(samples, "request_generation_tokens_bucket", le="10.0") == 20
        for engine in "01":
            assert value(samples, "engine_up", engine=engine, model_name="simulated") == 1
        assert labels_of(samples, "generation_tokens_total") == {"model_name", "engine"}
        assert labels_of(samples, "admission_rejections_total") == {"model_name"}
        names = {name for name, _ in samples}
        for metric in (*ENGINE_LAYOUT.metrics, *REQUEST_LAYOUT.metrics):
            suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket"}[metric.kind]
            assert f"asyncscale:{metric.name}{suffix}" in names


async def test_a_scrape_may_come_in_another_thread_and_after_the_end() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        server, thread = start_http_server(0, "127.0.0.1", registry_of(AsyncScaleCollector(client)))

        def get() -> Samples:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as response:
                return parse(response.read().decode())

        await generate(client, 3)
        assert value(await asyncio.to_thread(get), "generation_tokens_total") == 21
    assert await asyncio.to_thread(get) == {}
    await asyncio.to_thread(server.shutdown)
    server.server_close()
    await asyncio.to_thread(thread.join)


def test_a_blocking_client_can_be_scraped() -> None:
    with blocking.AsyncScaleClient(MODEL, num_engines=1) as client:
        registry = registry_of(AsyncScaleCollector(client))
        client.generate(PROMPT, max_tokens=7, ignore_eos=True).result()
        assert value(parse(generate_latest(registry).decode()), "generation_tokens_total") == 7
    assert generate_latest(registry) == b""


async def test_of_each_client_if_asked() -> None:
    async with (
        AsyncScaleClient(MODEL, num_engines=1) as owner,
        AsyncScaleClient.attach(owner.address) as other,
    ):
        await generate(owner, 1)
        async with AsyncScaleClient.attach(owner.address) as gone:
            await generate(gone, 2)
        await generate(other, 3)
        ids = [(await client.metrics()).client_id for client in (owner, other)]
        for client in (owner, other):
            samples = scrape(client, per_client=True)
            assert [value(samples, "tokens_received_total", client=one) for one in ids] == [7, 21]
            assert value(samples, "tokens_received_total", client="departed") == 14
            assert value(samples, "generation_tokens_total") == 42
            assert labels_of(samples, "generation_tokens_total") == {"model_name", "engine"}


async def test_processes_that_are_scraped_in_turn_show_the_same_from_the_first_scrape_on() -> None:
    async def front_end(client: AsyncScaleClient, index: int) -> tuple[float, float]:
        registry = registry_of(AsyncScaleCollector(client))
        async with asyncio.timeout(10):  # nobody looks until the owner's answer has come
            while not client._engines._metrics._newest.clients:  # type: ignore[attr-defined]  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        samples = parse(generate_latest(registry).decode())
        return value(samples, "tokens_received_total"), value(samples, "generation_tokens_total")

    async with AsyncScaleClient(MODEL, num_engines=1) as owner:
        await generate(owner, 3)
        assert await run_frontends(front_end, 2, owner.address) == [(21, 21), (21, 21)]


async def test_two_collectors_do_not_fit_in_one_registry() -> None:
    async with AsyncScaleClient(MODEL, num_engines=1) as client:
        with pytest.raises(ValueError, match="Duplicated"):
            registry_of(AsyncScaleCollector(client), AsyncScaleCollector(client))


def test_without_prometheus_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(ImportError, match=r"asyncscale\[metrics\]"):
        AsyncScaleCollector(AsyncScaleClient(MODEL))


def is_counter(name: str) -> bool:
    return name.endswith(("_total", "_bucket", "_sum", "_count"))


def assert_no_counter_fell(scrapes: Iterable[Samples]) -> int:
    """Nor vanished. How many scrapes there were."""
    last: Samples = {}
    count = 0
    for samples in scrapes:
        for key, before in last.items():
            if is_counter(key[0]):
                assert samples[key] >= before, key
        last, count = samples, count + 1
    return count


async def test_no_counter_ever_falls(tmp_path: Path) -> None:
    """Seen from an owner and from an attached client, while an engine and a front end are killed under load."""

    async def front_end(client: AsyncScaleClient, index: int) -> None:
        (tmp_path / f"{index}").write_text(f"{os.getpid()}")
        while True:
            await client.generate(PROMPT, max_tokens=20, ignore_eos=True)

    seen: dict[AsyncScaleClient, list[Samples]] = {}

    async def watch(client: AsyncScaleClient) -> None:
        while True:
            seen.setdefault(client, []).append(scrape(client))
            await asyncio.sleep(0.02)

    async with AsyncScaleClient(MODEL, num_engines=2) as owner, AsyncScaleClient.attach(owner.address) as other:
        front_ends = asyncio.ensure_future(run_frontends(front_end, 2, owner.address))
        watchers = [asyncio.ensure_future(watch(client)) for client in (owner, other)]

        await wait_until(lambda: sum(row.tokens_received > 100 for row in owner.metrics().clients.values()) == 2)
        load = [owner.generate(PROMPT, max_tokens=1000, ignore_eos=True) for _ in range(10)]
        await kill_engine(owner, 0)
        await asyncio.gather(*load)
        os.kill(int((tmp_path / "0").read_text()), signal.SIGKILL)
        with pytest.raises(FrontendError):
            await front_ends
        await wait_until(lambda: len(owner.metrics().clients) == 3)
        await wait_until(lambda: owner.metrics().engines[0].engine_up)
        for watcher in watchers:
            assert not watcher.done(), watcher.exception()
            watcher.cancel()
        assert value(scrape(owner), "engine_restarts_total", engine="0") == 1
        assert (await owner.metrics()).clients["departed"].tokens_received > 100
    assert all(assert_no_counter_fell(scrapes) > 10 for scrapes in seen.values())
