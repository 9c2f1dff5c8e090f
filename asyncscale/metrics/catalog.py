"""All metrics there are: what each is called, what it means, and who counts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from asyncscale.metrics.histogram import (
    INTER_TOKEN_LATENCY_BUCKETS,
    ITERATION_TOKENS_BUCKETS,
    REQUEST_LATENCY_BUCKETS,
    REQUEST_PARAMS_N_BUCKETS,
    REQUEST_TOKENS_BUCKETS,
    TIME_TO_FIRST_TOKEN_BUCKETS,
    Histogram,
)
from asyncscale.metrics.layout import FRACTION, Layout, counter, gauge, histogram, seconds

# How a request ended: vLLM's reasons, and "timeout", which there is an "abort".
OUTCOMES = ("stop", "length", "abort", "timeout", "error")


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """What one engine has counted, through all its restarts, also while it hangs and after it was killed; its owner
    counts the last four. Gauges are 0 while it is not up. Each of the n choices of a request is a sequence.
    """

    num_requests_running: int = gauge("Sequences that hold KV-cache blocks and are computed.", vllm=True)
    num_requests_waiting: int = gauge("Sequences that wait at the engine.", vllm=True)
    kv_cache_usage_perc: float = gauge("Used part of the KV cache, 0 to 1.", vllm=True, unit=FRACTION)
    prompt_tokens: int = counter("Tokens of prompts whose computation is complete, cached ones included.", vllm=True)
    generation_tokens: int = counter("Tokens generated.", vllm=True)
    num_preemptions: int = counter("Sequences that gave up their blocks to others, to be computed anew.", vllm=True)
    prefix_cache_queries: int = counter("Tokens that were looked up in the prefix cache.", vllm=True)
    prefix_cache_hits: int = counter("Tokens that were found in the prefix cache.", vllm=True)
    spec_decode_num_draft_tokens: int = counter("Tokens that were guessed.", vllm=True)
    spec_decode_num_accepted_tokens: int = counter("Guessed tokens that were right.", vllm=True)
    iteration_tokens_total: Histogram = histogram(
        "Tokens computed in one step.", buckets=ITERATION_TOKENS_BUCKETS, vllm=True
    )
    engine_malformed_messages: int = counter("Messages of clients that the engine dropped: they made no sense.")
    engine_up: int = gauge("1 while the engine takes requests, 0 while it does not.")
    engine_restarts: int = counter("How often it took requests again, after it had died.")
    engine_deaths: int = counter("How often it died, in whatever way.")
    engine_hangs: int = counter("How often it was killed because it made no progress.")

    @property
    def cache_hit_rate(self) -> float | None:
        """Found part of the tokens that were looked up in the prefix cache; None before the first."""
        return self.prefix_cache_hits / self.prefix_cache_queries if self.prefix_cache_queries else None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """What clients have counted of requests: of all, of one engine's (that which had it last), or of one client's.

    A request is one call of `generate`, `submit` or `chat`, whatever its `n`. Times in seconds by the client's clock;
    those of queue and prefill by its engine's, of the choice that was first to get a token.
    """

    request_success: Mapping[str, int] = counter(
        "Requests that have ended, well or not; n choices end as the first does.",
        vllm=True,
        label="finished_reason",
        values=OUTCOMES,
    )
    time_to_first_token_seconds: Histogram = seconds(
        "From the call to the first token.", buckets=TIME_TO_FIRST_TOKEN_BUCKETS, vllm=True
    )
    inter_token_latency_seconds: Histogram = seconds(
        "From one message with tokens of a sequence to the next; guessed tokens come together.",
        buckets=INTER_TOKEN_LATENCY_BUCKETS,
        vllm=True,
    )
    request_time_per_output_token_seconds: Histogram = seconds(
        "Mean time of a request's tokens after the first, of requests with two or more.",
        buckets=INTER_TOKEN_LATENCY_BUCKETS,
        vllm=True,
    )
    e2e_request_latency_seconds: Histogram = seconds(
        "From the call to the end, of requests that ended with stop or length.",
        buckets=REQUEST_LATENCY_BUCKETS,
        vllm=True,
    )
    request_queue_time_seconds: Histogram = seconds(
        "From arrival at the engine to the first step there.", buckets=REQUEST_LATENCY_BUCKETS, vllm=True
    )
    request_prefill_time_seconds: Histogram = seconds(
        "From the first step to the first token.", buckets=REQUEST_LATENCY_BUCKETS, vllm=True
    )
    request_decode_time_seconds: Histogram = seconds(
        "From the first token to the last.", buckets=REQUEST_LATENCY_BUCKETS, vllm=True
    )
    request_inference_time_seconds: Histogram = seconds(
        "From the first step to the last token.", buckets=REQUEST_LATENCY_BUCKETS, vllm=True
    )
    request_held_time_seconds: Histogram = seconds(
        "From the call until it was sent to an engine: it waits at its client while all engines are full.",
        buckets=REQUEST_LATENCY_BUCKETS,
    )
    request_prompt_tokens: Histogram = histogram(
        "Prompt tokens of requests that have ended.", buckets=REQUEST_TOKENS_BUCKETS, vllm=True
    )
    request_generation_tokens: Histogram = histogram(
        "Tokens that requests had got when they ended, all choices together.", buckets=REQUEST_TOKENS_BUCKETS, vllm=True
    )
    request_params_n: Histogram = histogram("The parameter n.", buckets=REQUEST_PARAMS_N_BUCKETS, vllm=True)
    request_params_max_tokens: Histogram = histogram(
        "The parameter max_tokens, or the room in the context.", buckets=REQUEST_TOKENS_BUCKETS, vllm=True
    )
    request_prefix_cache_queries: int = counter("Prompt tokens of requests that have their first token.")
    request_prefix_cache_hits: int = counter("Those of them that were found in the prefix cache.")
    tokens_received: int = counter("Tokens that came from engines for requests that still wanted them.")
    request_moves: int = counter("How often requests were sent anew because their engine died or was cut off.")
    num_requests_held: int = gauge(
        "Requests that wait at their client until an engine has a free slot.", has_engine=False
    )
    admission_rejections: int = counter("Requests refused with OverloadedError.", vllm=True, has_engine=False)
    client_malformed_messages: int = counter(
        "Messages of engines, owner or clients that a client dropped: they made no sense.", has_engine=False
    )

    @property
    def cache_hit_rate(self) -> float | None:
        """Found part of the prompts' tokens that were looked up in the prefix cache; None before the first."""
        queries = self.request_prefix_cache_queries
        return self.request_prefix_cache_hits / queries if queries else None


ENGINE_LAYOUT = Layout(EngineMetrics)
REQUEST_LAYOUT = Layout(RequestMetrics)
