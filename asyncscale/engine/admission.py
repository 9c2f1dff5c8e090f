"""From a client's untrusted Add message to requests that can do no harm."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator

import msgspec
import numpy as np

from asyncscale.engine.request import Request
from asyncscale.messages import Add
from asyncscale.params import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    Sampling,
)

MAX_CHOICES = 1024
_MAX_WEIGHT = 2**31 - 1  # sums of them stay within what a message can say
_INT64 = range(-(2**63) + 1, 2**63)
_REQUEST_IDS = range(2**63 - MAX_CHOICES)


def choice_ids(message: Add) -> range:
    """The request ids of the message's choices; only the first where the others make no sense."""
    makes_sense = 1 <= message.n <= MAX_CHOICES and message.request_id in _REQUEST_IDS
    return range(message.request_id, message.request_id + (message.n if makes_sense else 1))


def find_defect(message: Add, vocab_size: int, max_model_len: int) -> str | None:
    """Why this request cannot be computed, or None. Checks all that could make a step fail for the others in it."""
    return next(_defects(message, vocab_size, max_model_len), None)


def make_choices(message: Add, client: bytes, *, arrival: float, first_order: int) -> list[Request]:
    """One request per choice, from a message without defect."""
    token_ids = np.frombuffer(message.token_ids, "<i4").astype(np.int32)
    return [
        Request(
            client,
            request_id,
            token_ids,
            message.num_prompt_tokens,
            _sampling_of(message.sampling, choice),
            priority=message.priority,
            weight=message.weight,
            arrival=arrival,
            order=first_order + choice,
        )
        for choice, request_id in enumerate(choice_ids(message))
    ]


def _sampling_of(sampling: Sampling, choice: int) -> Sampling:
    """Choice c is drawn with seed + c (mod 2**64); the prompt's log-probabilities come with the first."""
    prompt_logprobs = None if choice else sampling.prompt_logprobs
    return msgspec.structs.replace(sampling, seed=(sampling.seed + choice) % 2**64, prompt_logprobs=prompt_logprobs)


def _defects(message: Add, vocab_size: int, max_model_len: int) -> Iterator[str]:
    if not 1 <= message.n <= MAX_CHOICES:
        yield f"n must be in [1, {MAX_CHOICES}], got {message.n}"
    if message.request_id not in _REQUEST_IDS:
        yield f"request_id must be in [0, 2**63 - {MAX_CHOICES}), got {message.request_id}"
    if message.priority not in _INT64:
        yield f"priority must be a 64-bit integer, got {message.priority}"
    if not 0 <= message.weight <= _MAX_WEIGHT:
        yield f"weight must be in [0, {_MAX_WEIGHT}], got {message.weight}"
    yield from _token_defects(message, vocab_size, max_model_len)
    yield from _sampling_defects(message.sampling, vocab_size)


def _token_defects(message: Add, vocab_size: int, max_model_len: int) -> Iterator[str]:
    num_tokens, rest = divmod(len(message.token_ids), 4)
    if rest:
        yield f"token_ids must hold 4 bytes per token, got {len(message.token_ids)} bytes"
        return
    if num_tokens == 0:
        yield "the prompt is empty"
    if not 1 <= message.num_prompt_tokens <= num_tokens:
        yield f"num_prompt_tokens must be in [1, {num_tokens}], got {message.num_prompt_tokens}"
    if message.num_prompt_tokens > max_model_len:
        yield f"a prompt of {message.num_prompt_tokens} tokens is longer than the model's context of {max_model_len}"
    if message.num_prompt_tokens == max_model_len or num_tokens > max_model_len:
        yield f"{num_tokens} tokens leave no room for output in the model's context of {max_model_len}"
    token_ids = np.frombuffer(message.token_ids, "<i4")
    yield from _outside("token_ids", token_ids[(token_ids < 0) | (token_ids >= vocab_size)].tolist(), vocab_size)


def _sampling_defects(sampling: Sampling, vocab_size: int) -> Iterator[str]:
    yield from _length_defects(sampling)
    yield from _outside("stop_token_ids", sampling.stop_token_ids, vocab_size)
    yield from _outside("logit_bias", (token_id for token_id, _ in sampling.logit_bias), vocab_size)
    for word in sampling.bad_words_token_ids:
        if not word:
            yield "bad_words_token_ids must not hold an empty word"
        yield from _outside("bad_words_token_ids", word, vocab_size)
    if sampling.max_tokens < 1:
        yield f"max_tokens must be at least 1, got {sampling.max_tokens}"
    for name, low, high in _RANGES:
        value = getattr(sampling, name)
        if not low <= value <= high:  # also true for NaN
            yield f"{name} must be in [{low}, {high}], got {value}"
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(sampling, name)
        if value is not None and not 0 <= value <= min(MAX_LOGPROBS, vocab_size):
            yield f"{name} must be in [0, {min(MAX_LOGPROBS, vocab_size)}], got {value}"
    if not all(math.isfinite(bias) for _, bias in sampling.logit_bias):
        yield "logit_bias must hold finite numbers"


def _length_defects(sampling: Sampling) -> Iterator[str]:
    for name, most in _LENGTHS:
        if len(getattr(sampling, name)) > most:
            yield f"{name} must hold at most {most} items, got {len(getattr(sampling, name))}"
    if sum(map(len, sampling.bad_words_token_ids)) > MAX_BAD_WORD_TOKENS:
        yield f"bad_words_token_ids must hold at most {MAX_BAD_WORD_TOKENS} tokens"


def _outside(name: str, token_ids: Iterable[int], vocab_size: int) -> Iterator[str]:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            yield f"{name} must hold token ids in [0, {vocab_size}), got {token_id}"


_LENGTHS = (
    ("stop_token_ids", MAX_STOP_TOKEN_IDS + 64),  # the model's own come on top of the caller's
    ("logit_bias", MAX_LOGIT_BIAS),
    ("bad_words_token_ids", 2 * MAX_BAD_WORDS),  # each alone, and after a space
)
_MAX_FLOAT = sys.float_info.max
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("min_tokens", 0, _INT64[-1]),
    ("top_k", 0, _INT64[-1]),
    ("temperature", 0.0, _MAX_FLOAT),
    ("top_p", sys.float_info.min, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", sys.float_info.min, _MAX_FLOAT),
    ("presence_penalty", -_MAX_FLOAT, _MAX_FLOAT),
    ("frequency_penalty", -_MAX_FLOAT, _MAX_FLOAT),
)
