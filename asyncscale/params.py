"""How tokens are chosen: what the caller asks for, and the same resolved to what an engine needs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import msgspec

from asyncscale.errors import InvalidRequestError
from asyncscale.suggestions import did_you_mean

GREEDY_EPSILON = 1e-5  # a lower temperature is greedy, as in vLLM
_MAX_COUNT = 2**31 - 1

# How many a request may have, for callers and for engines alike. All of a request must fit a message.
MAX_STOP_TOKEN_IDS = 4096
MAX_LOGIT_BIAS = 65_536
MAX_BAD_WORDS = 4096
MAX_BAD_WORD_TOKENS = 65_536  # of all words together
MAX_LOGPROBS = 1000
_LEAST = sys.float_info.min  # what is less is lost in arithmetic

# What a field means when neither the caller nor the model's generation_config.json sets it (vLLM's defaults).
_DEFAULTS: dict[str, float | int] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
}  # fmt: skip


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Field names and meanings are vLLM's. `None` takes the model's own default, else vLLM's.

    ::

        client.generate(prompt, SamplingParams(temperature=0.8, top_p=0.95, max_tokens=64))
        client.generate(prompt, temperature=0.8, top_p=0.95, max_tokens=64)      # the same

    n: how many completions of the prompt (`Token.choice`, `Completion.choices`).
    temperature: 0 is greedy. top_k: 0 or -1 is off. min_p: relative to the most likely token's probability.
    presence_penalty, frequency_penalty: in [-2, 2], over generated tokens; repetition_penalty: over prompt and
    generated tokens. seed: makes sampling repeatable: same seed, same tokens, alone or in a crowd, on any engine.
    stop: strings that end the text (left out of it unless include_stop_str_in_output). stop_token_ids: tokens that
    do. bad_words: strings never generated. logit_bias: token id -> added to its logit.
    min_tokens: no end before so many tokens. max_tokens: None is the rest of the context.
    logprobs: log-probabilities of the chosen token and of so many most likely ones; prompt_logprobs: likewise for the
    prompt.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logit_bias: Mapping[int, float] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @classmethod
    def of(cls, params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
        """`params` with the keyword arguments of a call laid over it, checked. Raises InvalidRequestError."""
        if params is not None and not isinstance(params, cls):
            cure = ": pass SamplingParams(**params)" if isinstance(params, Mapping) else ""
            raise InvalidRequestError(f"params must be a SamplingParams or None, got {type(params).__name__}{cure}")
        if unknown := overrides.keys() - _CHECKS.keys():
            raise InvalidRequestError(_unknown(min(unknown)))
        merged = msgspec.structs.replace(params or _DEFAULT_PARAMS, **overrides)
        merged.validate(overrides if params is None else None)
        return merged

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def validate(self, names: Iterable[str] | None = None) -> None:
        """Raises InvalidRequestError, naming the field, when a value has a wrong type or is out of range.

        names: the fields to look at; None is all.
        """
        for name in self.__struct_fields__ if names is None else names:
            _CHECKS[name](name, getattr(self, name))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must not be greater than max_tokens ({self.max_tokens})"
            )

    def default(self, name: str, model_defaults: Mapping[str, Any]) -> Any:
        """The value of field `name`: the caller's, else the model's, else vLLM's."""
        value = getattr(self, name)
        if value is None:
            value = model_defaults.get(name)
        return _DEFAULTS[name] if value is None else value


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """Sampling parameters resolved to concrete values: what goes to an engine, per choice.

    top_k: 0 is off. stop_token_ids: every token that ends the request, end-of-sequence included unless ignored.
    seed: uint64; of the request's choice c, token at absolute position p (prompt length + tokens generated before it)
    is drawn with (seed + c, p) and with nothing else. max_tokens: concrete.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON


# How transformers, OpenAI and SGLang call the same.
_SYNONYMS = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_sequences": "stop",
    "eos_token_id": "stop_token_ids",
    "top_logprobs": "logprobs",
    "random_seed": "seed",
}
_OF_REQUESTS = ("request_id", "priority", "timeout", "engine", "session")
_CURES = {
    "stream": "every request streams: `async for token in client.generate(...)`",
    "do_sample": "temperature=0 takes the most likely token, any other samples",
    "params": "a SamplingParams goes second, without a name: generate(prompt, params)",
    "sampling_params": "a SamplingParams goes second, without a name: generate(prompt, params)",
    "prompt": "the prompt goes first, without a name: generate(prompt)",
    "messages": "a conversation goes to `chat`",
    "model": "the model is chosen when the client is made",
}


def _unknown(name: str) -> str:
    cure = f": {_CURES[name]}" if name in _CURES else did_you_mean(name, (*_CHECKS, *_OF_REQUESTS), _SYNONYMS)
    return f"unknown sampling parameter {name!r}{cure}"


Check = Callable[[str, object], None]


def _integer(low: int, high: int) -> Check:
    def check(name: str, value: object) -> None:
        if value is None and name in _OPTIONAL:
            return
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidRequestError(f"{name} must be an integer, got {value!r}")
        if value < low:
            raise InvalidRequestError(f"{name} must be at least {low}, got {value}")
        if value > high:
            raise InvalidRequestError(f"{name} must be at most {high}, got {value}")

    return check


def _number(low: float, high: float, *, open_low: bool = False) -> Check:
    def check(name: str, value: object) -> None:
        if value is None and name in _OPTIONAL:
            return
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InvalidRequestError(f"{name} must be a number, got {value!r}")
        is_finite = abs(value) <= sys.float_info.max  # also false for NaN, and for an int that no float holds
        if not is_finite or not low <= value <= high or (open_low and value < _LEAST):
            raise InvalidRequestError(f"{name} must be a finite number {_range(low, high, open_low)}, got {value}")

    return check


def _bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be a bool, got {value!r}")


def _token_ids(name: str, value: object) -> None:
    for token_id in () if value is None else _items(name, value, MAX_STOP_TOKEN_IDS):
        _COUNT(f"an item of {name}", token_id)


def _logit_bias(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{name} must map token ids to numbers, got {value!r}")
    _check_length(name, value, MAX_LOGIT_BIAS)
    for token_id, bias in value.items():
        _COUNT(f"a key of {name}", token_id)
        _ANY_NUMBER(f"a value of {name}", bias)


def _range(low: float, high: float, open_low: bool = False) -> str:
    if low == -math.inf and high == math.inf:
        return "of any size"
    if high == math.inf:
        return f"greater than {low}" if open_low else f"at least {low}"
    return f"in {'(' if open_low else '['}{low}, {high}]"


def _items(name: str, values: object, most: int) -> Sequence[object]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InvalidRequestError(f"{name} must be a list, got {values!r}")
    _check_length(name, values, most)
    return values


def _check_length(name: str, values: Sized, most: int) -> None:
    if len(values) > most:
        raise InvalidRequestError(f"{name} must hold at most {most} items, got {len(values)}")


def _strings(name: str, values: object) -> None:
    if name == "stop" and isinstance(values, str):
        values = (values,)
    most = MAX_BAD_WORDS if name == "bad_words" else _MAX_COUNT  # stop strings stay with the caller
    for value in () if values is None else _items(name, values, most):
        if not isinstance(value, str):
            raise InvalidRequestError(f"{name} must hold strings, got {value!r}")
        if not value:
            raise InvalidRequestError(f"{name} must not hold an empty string")


_OPTIONAL = frozenset(name for name in SamplingParams.__struct_fields__ if getattr(SamplingParams(), name) is None)
_DEFAULT_PARAMS = SamplingParams()
_COUNT, _ANY_NUMBER = _integer(0, _MAX_COUNT), _number(-math.inf, math.inf)
_CHECKS: dict[str, Check] = {
    "n": _integer(1, 1024),
    "temperature": _number(0.0, math.inf),
    "top_p": _number(0.0, 1.0, open_low=True),
    "top_k": _integer(-1, _MAX_COUNT),
    "min_p": _number(0.0, 1.0),
    "repetition_penalty": _number(0.0, math.inf, open_low=True),
    "presence_penalty": _number(-2.0, 2.0),
    "frequency_penalty": _number(-2.0, 2.0),
    "seed": _integer(-(2**63), 2**64 - 1),
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "bad_words": _strings,
    "logit_bias": _logit_bias,
    "ignore_eos": _bool,
    "max_tokens": _integer(1, _MAX_COUNT),
    "min_tokens": _COUNT,
    "logprobs": _integer(0, MAX_LOGPROBS),
    "prompt_logprobs": _integer(0, MAX_LOGPROBS),
    "include_stop_str_in_output": _bool,
    "skip_special_tokens": _bool,
}
