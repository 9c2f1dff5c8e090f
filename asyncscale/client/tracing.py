"""A span of OpenTelemetry for each request.

Names follow the semantic conventions for generative AI, version 1.41.0 (in development then), of spans of inference:
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/. Where those have nothing, latencies and the request's
id are called as vLLM calls them (`gen_ai.latency.*`, in seconds; `gen_ai.request.id`), and the rest `asyncscale.*`.

Extra `tracing` (opentelemetry-api). Nothing of it is imported here before a program has done so itself.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import TYPE_CHECKING

import asyncscale
from asyncscale.errors import ClientClosedError, RequestAbortedError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer, TracerProvider
    from opentelemetry.util.types import AttributeValue

    from asyncscale.client.stream import RequestStream

logger = logging.getLogger(__name__)

_SCHEMA_URL = "https://opentelemetry.io/schemas/1.41.0"
_MAX_INT = 2**63 - 1  # of an attribute, where spans are exported


class Tracing:
    """Gives requests their spans::

        tracing = Tracing(provider)
        tracing.model = "smollm2-135m-instruct"
        tracing.follow(request, "chat")       # in the context of the call, whose current span is the parent

    provider: None is the global one, from when the program has configured it; until then no request has a span, which
    costs a look into a dictionary. Raises TypeError for what is no provider.
    """

    def __init__(self, provider: TracerProvider | None) -> None:
        self.model = ""
        self._tracer = None if provider is None else _tracer(provider)

    def follow(self, request: RequestStream, operation: str) -> None:
        """Begin the span of a request that has just begun. operation: "chat" or "text_completion"."""
        tracer = self._tracer or self._find_tracer()
        if tracer is None:
            return
        try:
            span = self._start(tracer, request, operation)
        except Exception:  # of a sampler or processor of the program's: no reason to have no answer
            logger.exception("cannot start the span of request %r", request.request_id)
            return
        if span.is_recording():
            request.span = RequestSpan(span, self.model)
            if request.done:
                request.span.end(request)

    def _find_tracer(self) -> Tracer | None:
        api = sys.modules.get("opentelemetry.trace")
        if api is None:
            return None
        provider = api.get_tracer_provider()
        if isinstance(provider, api.ProxyTracerProvider):
            return None  # which stands for one that may be configured yet
        self._tracer = _tracer(provider)
        return self._tracer

    def _start(self, tracer: Tracer, request: RequestStream, operation: str) -> Span:
        from opentelemetry.trace import SpanKind

        age_ns = int((time.monotonic() - request.arrival) * 1e9)
        return tracer.start_span(
            f"{operation} {self.model}",
            kind=SpanKind.CLIENT,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "asyncscale",
                "gen_ai.request.model": self.model,
                **_request_attributes(request),
            },
            start_time=time.time_ns() - age_ns,
        )


class RequestSpan:
    """The span of one request. What happens to the request is told to it."""

    __slots__ = ("_model", "_span")

    def __init__(self, span: Span, model: str) -> None:
        self._span = span
        self._model = model

    def first_token(self) -> None:
        """Its first token has arrived."""
        self._span.add_event("asyncscale.first_token")

    def preempted(self, engine_id: int) -> None:
        """One of its choices lost its KV blocks, and will be computed again."""
        self._span.add_event("asyncscale.preempted", {"asyncscale.engine.id": engine_id})

    def moved(self, engine_id: int | None) -> None:
        """What is left of it is to be done anew, as this engine cannot."""
        self._span.add_event("asyncscale.moved", {} if engine_id is None else {"asyncscale.engine.id": engine_id})

    def end(self, request: RequestStream) -> None:
        """The request has ended, in whatever way."""
        try:
            self._span.set_attributes(_result_attributes(request, self._model))
            if request.error is not None:
                self._set_error(request.error)
            self._span.end()
        except Exception:  # of a processor or exporter of the program's: other requests go on
            logger.exception("cannot end the span of request %r", request.request_id)

    def _set_error(self, error: BaseException) -> None:
        from opentelemetry.trace import StatusCode

        text = str(error.args[0]) if error.args else str(error)
        if isinstance(error, RequestAbortedError | ClientClosedError | asyncio.CancelledError):  # somebody wanted that
            self._span.add_event("asyncscale.aborted", {"asyncscale.reason": text})
            return
        self._span.set_attribute("error.type", f"{type(error).__module__}.{type(error).__qualname__}")
        self._span.record_exception(error)
        self._span.set_status(StatusCode.ERROR, text)


def _tracer(provider: TracerProvider) -> Tracer:
    if not hasattr(provider, "get_tracer"):
        raise TypeError(
            f"tracer_provider must be a TracerProvider of OpenTelemetry or None, got {type(provider).__name__}"
        )
    return provider.get_tracer("asyncscale", asyncscale.__version__, _SCHEMA_URL)


def _request_attributes(request: RequestStream) -> dict[str, AttributeValue]:
    sampling, params = request.sampling, request.params
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
    }
    if sampling.top_k:
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if sampling.presence_penalty:
        attributes["gen_ai.request.presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty:
        attributes["gen_ai.request.frequency_penalty"] = sampling.frequency_penalty
    if params.seed is not None and abs(params.seed) <= _MAX_INT:
        attributes["gen_ai.request.seed"] = params.seed
    if params.n > 1:
        attributes["gen_ai.request.choice.count"] = params.n
    if params.stop_strings:
        attributes["gen_ai.request.stop_sequences"] = tuple(params.stop_strings)
    if request.session is not None:
        attributes["gen_ai.conversation.id"] = request.session
    return attributes


def _result_attributes(request: RequestStream, model: str) -> dict[str, AttributeValue]:
    timing = request.timing()
    in_engine = None if timing.prefill_s is None else timing.prefill_s + (timing.decode_s or 0.0)
    attributes: dict[str, AttributeValue | None] = {
        "gen_ai.response.id": request.request_id,
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": tuple(choice.finish_reason or "error" for choice in request.choices),
        "gen_ai.usage.output_tokens": timing.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": timing.num_cached_tokens,
        "gen_ai.latency.time_in_queue": None if timing.held_s is None else timing.held_s + timing.queued_s,
        "gen_ai.latency.time_to_first_token": timing.ttft,
        "gen_ai.latency.time_in_model_prefill": timing.prefill_s,
        "gen_ai.latency.time_in_model_decode": timing.decode_s,
        "gen_ai.latency.time_in_model_inference": in_engine,
        "gen_ai.latency.e2e": timing.e2e,
        "asyncscale.engine.id": timing.engine,
        "asyncscale.num_preemptions": timing.num_preemptions,
        "asyncscale.num_moves": timing.num_moves,
    }
    return {name: value for name, value in attributes.items() if value is not None}
