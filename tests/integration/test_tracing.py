"""Spans of requests: real engines, and the SDK of OpenTelemetry with its exporter that keeps them in memory."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from asyncscale import (
    AsyncScaleClient,
    ClientClosedError,
    EngineDeadError,
    InvalidRequestError,
    RequestAbortedError,
    RequestTimeoutError,
    SimulatedModel,
    blocking,
)

MODEL = SimulatedModel(base_ms=2, decode_us=1, prefill_us=1)
ENDLESS: dict[str, Any] = {"max_tokens": 5000, "ignore_eos": True}


class Spans:
    """What was exported. The SDK warns of a span that ends twice, and warnings fail tests."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def all(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def only(self) -> ReadableSpan:
        [span] = self.all()
        return span


@pytest.fixture
def spans(caplog: pytest.LogCaptureFixture) -> Iterator[Spans]:
    spans = Spans()
    yield spans
    spans.provider.shutdown()
    assert "ended span" not in caplog.text


def events(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_request_that_finishes(spans: Spans) -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, tracer_provider=spans.provider) as client:
        prompt = "x" * 40
        await client.generate(prompt, max_tokens=1)
        completion = await client.generate(
            prompt, request_id="mine", session="s", temperature=0.5, seed=7, max_tokens=5, stop=["zzz"], ignore_eos=True
        )
    span, timing = spans.all()[-1], completion.timing
    assert (span.name, span.kind) == ("text_completion simulated", SpanKind.CLIENT)
    assert span.status.status_code is StatusCode.UNSET
    assert events(span) == ["asyncscale.first_token"]
    assert attributes(span) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "asyncscale",
        "gen_ai.request.model": "simulated",
        "gen_ai.request.id": "mine",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ("zzz",),
        "gen_ai.conversation.id": "s",
        "gen_ai.response.id": "mine",
        "gen_ai.response.model": "simulated",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 32,
        "gen_ai.latency.time_in_queue": pytest.approx((timing.held_s or 0) + timing.queued_s),
        "gen_ai.latency.time_to_first_token": timing.ttft,
        "gen_ai.latency.time_in_model_prefill": timing.prefill_s,
        "gen_ai.latency.time_in_model_decode": timing.decode_s,
        "gen_ai.latency.time_in_model_inference": pytest.approx((timing.prefill_s or 0) + (timing.decode_s or 0)),
        "gen_ai.latency.e2e": timing.e2e,
        "asyncscale.engine.id": 0,
        "asyncscale.num_preemptions": 0,
        "asyncscale.num_moves": 0,
    }
    assert span.start_time is not None
    assert span.end_time is not None
    assert timing.e2e is not None
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(timing.e2e, abs=0.2)


async def test_a_chat_and_several_choices(spans: Spans) -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, tracer_provider=spans.provider) as client:
        await client.chat([{"role": "user", "content": "hello"}], n=2, max_tokens=2, ignore_eos=True)
    span = spans.only()
    assert span.name == "chat simulated"
    assert attributes(span)["gen_ai.request.choice.count"] == 2
    assert attributes(span)["gen_ai.response.finish_reasons"] == ("length", "length")


async def test_the_parent_is_the_span_of_the_call(spans: Spans) -> None:
    tracer = spans.provider.get_tracer("test")

    async def ask(client: AsyncScaleClient, name: str) -> None:
        with tracer.start_as_current_span(name):
            generation = client.generate("hello", request_id=f"{name}-1", max_tokens=3)
            submitted = await client.submit("hello", request_id=f"{name}-2", max_tokens=3)
        with tracer.start_as_current_span("elsewhere"):  # where it is read does not matter
            await asyncio.gather(generation, submitted)

    async with AsyncScaleClient(MODEL, num_engines=1, tracer_provider=spans.provider) as client:
        await asyncio.gather(*(ask(client, f"caller-{index}") for index in range(5)))
    by_id = {span.context.span_id: span.name for span in spans.all() if span.context is not None}
    parents = {
        attributes(span)["gen_ai.request.id"]: by_id[span.parent.span_id]
        for span in spans.all()
        if span.parent is not None
    }
    assert parents == {f"caller-{index}-{call}": f"caller-{index}" for index in range(5) for call in (1, 2)}


def test_the_parent_of_a_blocking_call(spans: Spans) -> None:
    tracer = spans.provider.get_tracer("test")
    with (
        blocking.AsyncScaleClient(MODEL, num_engines=1, tracer_provider=spans.provider) as client,
        tracer.start_as_current_span("caller") as caller,
    ):
        client.generate("hello", max_tokens=3).result()
    request = spans.all()[0]
    assert request.parent is not None
    assert request.parent.span_id == caller.get_span_context().span_id


async def test_aborts_are_no_errors(spans: Spans) -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, tracer_provider=spans.provider) as client:
        aborted = client.generate("hello", **ENDLESS)
        tokens = aiter(aborted)
        await anext(tokens)
        aborted.abort()
        aborted.abort()
        with pytest.raises(RequestAbortedError):
            await aborted

        async for _ in client.generate("hello", **ENDLESS):
            break
        gc.collect()

        async def read() -> None:
            await client.generate("hello", **ENDLESS)

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        left = client.generate("hello", **ENDLESS)
    with pytest.raises(ClientClosedError):
        await left
    assert len(spans.all()) == 4
    for span in spans.all():
        assert span.status.status_code is StatusCode.UNSET
        assert attributes(span)["gen_ai.response.finish_reasons"] == ("abort",)
        assert events(span)[-1] == "asyncscale.aborted"
    reasons = [dict(span.events[-1].attributes or {})["asyncscale.reason"] for span in spans.all()]
    assert [str(reason).partition("was ")[2] for reason in reasons] == [
        "aborted",
        "left before its end",
        "aborted",
        "closed",
    ]


async def test_a_timeout_is_an_error(spans: Spans) -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, tracer_provider=spans.provider) as client:
        with pytest.raises(RequestTimeoutError):
            await client.generate("hello", timeout=0.05, **ENDLESS)
    span = spans.only()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is not None
    assert "did not finish within 0.05 s" in span.status.description
    assert attributes(span)["error.type"] == "asyncscale.errors.RequestTimeoutError"
    assert events(span)[-1] == "exception"


async def test_a_request_that_goes_on_at_another_engine(spans: Spans) -> None:
    async with AsyncScaleClient(MODEL, num_engines=2, tracer_provider=spans.provider) as client:
        pids = [info["pid"] for info in await client.collective_rpc("process_info")]
        generation = client.generate("hello", max_tokens=100, ignore_eos=True)
        tokens = aiter(generation)
        await anext(tokens)
        first = generation.timing.engine
        assert first is not None
        os.kill(pids[first], signal.SIGKILL)
        await generation
    span = spans.only()
    assert events(span) == ["asyncscale.first_token", "asyncscale.moved"]
    assert dict(span.events[1].attributes or {}) == {"asyncscale.engine.id": first}
    assert attributes(span)["asyncscale.engine.id"] == 1 - first
    assert attributes(span)["asyncscale.num_moves"] == 1
    assert span.status.status_code is StatusCode.UNSET


async def test_a_request_whose_engines_die_twice(spans: Spans) -> None:
    model = SimulatedModel(base_ms=2, decode_us=1, prefill_us=1, faults={300: "kill"})
    async with AsyncScaleClient(model, num_engines=2, tracer_provider=spans.provider) as client:
        with pytest.raises(EngineDeadError):
            await client.generate([300], max_tokens=50, ignore_eos=True)
    span = spans.only()
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(span)["error.type"] == "asyncscale.errors.EngineDeadError"
    assert events(span)[-1] == "exception"


async def test_preemptions(spans: Spans) -> None:
    async with AsyncScaleClient(
        MODEL, num_engines=1, num_kv_blocks=12, max_model_len=128, tracer_provider=spans.provider
    ) as client:
        await asyncio.gather(*(client.generate("hello", max_tokens=80, ignore_eos=True) for _ in range(4)))
    counts = [attributes(span)["asyncscale.num_preemptions"] for span in spans.all()]
    assert sum(counts) > 0
    assert [events(span).count("asyncscale.preempted") for span in spans.all()] == counts


async def test_a_call_that_is_refused_has_no_span(spans: Spans) -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, tracer_provider=spans.provider) as client:
        with pytest.raises(InvalidRequestError):
            client.generate("hello", temperature=-1)
    assert spans.all() == ()


async def test_requests_that_are_not_sampled_cost_no_more(spans: Spans) -> None:
    async with AsyncScaleClient(MODEL, num_engines=1, tracer_provider=TracerProvider(sampler=ALWAYS_OFF)) as client:
        generation = client.generate("hello", max_tokens=2)
        assert generation._stream.span is None
        await generation


class Broken(SpanProcessor):
    """A processor of a program's own, with a defect."""

    def on_end(self, span: ReadableSpan) -> None:
        raise ValueError("broken")


async def test_a_broken_processor_harms_no_request(caplog: pytest.LogCaptureFixture) -> None:
    provider = TracerProvider()
    provider.add_span_processor(Broken())
    async with AsyncScaleClient(MODEL, num_engines=1, tracer_provider=provider) as client:
        generations = [client.generate("hello", max_tokens=2, ignore_eos=True) for _ in range(3)]
        assert [len((await generation).token_ids) for generation in generations] == [2, 2, 2]
    assert caplog.text.count("cannot end the span of request") == 3


def test_what_is_no_provider_is_refused() -> None:
    with pytest.raises(TypeError, match="tracer_provider must be a TracerProvider"):
        AsyncScaleClient(MODEL, tracer_provider="http://localhost:4317")  # type: ignore[arg-type]


@pytest.mark.parametrize("configured", ["before", "after", "never", "not imported"])
def test_the_global_provider_is_used_from_when_it_is_configured(workspace: Path, configured: str) -> None:
    script = f"""
import asyncio, sys
from asyncscale import AsyncScaleClient, SimulatedModel

configured = {configured!r}
if configured != "not imported":
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

async def main():
    if configured == "before":
        trace.set_tracer_provider(provider)
    async with AsyncScaleClient(SimulatedModel(), num_engines=1) as client:
        await client.generate("hello", max_tokens=2)
        if configured == "after":
            trace.set_tracer_provider(provider)
        await client.generate("hello", max_tokens=2)
    if configured == "not imported":
        print(sum(name.startswith("opentelemetry") for name in sys.modules))
    else:
        print(len(exporter.get_finished_spans()))

asyncio.run(main())
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=workspace, capture_output=True, text=True, timeout=60, check=True
    )
    expected = {"before": 2, "after": 1, "never": 0, "not imported": 0}
    assert (result.stdout, result.stderr) == (f"{expected[configured]}\n", "")


async def test_a_client_that_is_attached_has_a_provider_of_its_own(spans: Spans) -> None:
    async with (
        AsyncScaleClient(MODEL, num_engines=1) as owner,
        AsyncScaleClient.attach(owner.address, tracer_provider=spans.provider) as attached,
    ):
        await asyncio.gather(*(client.generate("hello", max_tokens=2) for client in (owner, attached)))
    assert spans.only().name == "text_completion simulated"


async def test_a_request_that_waits_in_turn_until_its_client_is_closed(spans: Spans) -> None:
    client = AsyncScaleClient(
        MODEL, num_engines=1, max_num_seqs=1, max_queued_requests=0, tracer_provider=spans.provider
    )
    async with client:
        running = client.generate("hello", **ENDLESS)
        waiting = asyncio.create_task(client.submit("hello", **ENDLESS))
        await asyncio.sleep(0)
        assert spans.all() == ()
    with pytest.raises(ClientClosedError):
        await waiting
    with pytest.raises(ClientClosedError):
        await running
    assert [events(span)[-1] for span in spans.all()] == ["asyncscale.aborted"] * 2
    assert {attributes(span).get("gen_ai.latency.time_in_queue") is None for span in spans.all()} == {True, False}
