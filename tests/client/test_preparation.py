"""Bad input is refused by the call itself, with words that help; good input is resolved to concrete values."""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
import pytest

from asyncscale.client.preparation import Preparation, RequestOptions
from asyncscale.config import SimulatedModel
from asyncscale.errors import InvalidRequestError
from asyncscale.messages import EngineFacts
from asyncscale.params import Sampling, SamplingParams
from asyncscale.tokenization.simulated import SimulatedTokenizer

FACTS = EngineFacts(
    vocab_size=1000, max_model_len=64, max_num_seqs=8, block_size=4, num_blocks=100, dtype="simulated", load_s=0.0
)
PREPARATION = Preparation(SimulatedTokenizer(SimulatedModel(vocab_size=1000)), FACTS)


def resolve(num_prompt_tokens: int = 10, **params: Any) -> Sampling:
    return PREPARATION.resolve(SamplingParams.of(None, params), num_prompt_tokens)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        (np.zeros(0, np.int64), "empty"),
        (np.zeros(0), "empty"),
        (np.array([[1, 2], [3, 4]]), "sequence of token ids"),
        (np.array([1.5]), "sequence of token ids"),
        (np.array([True]), "sequence of token ids"),
        (None, "NoneType"),
        (7, "int 7"),
        (b"bytes", "bytes"),
        ({"a": 1}, "dict"),
        ([1.5, 2.0], "sequence of token ids"),
        (["a", "b"], "sequence of token ids"),
        ([True, False], "sequence of token ids"),
        ((1, True), "sequence of token ids"),
        ([[1, 2], [3, 4]], "sequence of token ids"),
        ([[1], [2, 3]], "sequence of token ids"),
        ([1, None], "sequence of token ids"),
        ([2**80], "sequence of token ids"),
        ([1, -1], "token id -1 is out of range: the model has ids 0 to 999"),
        ([1, 1000], "token id 1000 is out of range"),
        ([1, 2**40], f"token id {2**40} is out of range"),
        (np.array([2**32 + 1]), f"token id {2**32 + 1} is out of range"),
        ("\ud800", "not valid Unicode"),
        ("x" * 64, "prompt has 64 tokens, but the model's context is 64 tokens"),
    ],
)
def test_a_bad_prompt_is_refused(prompt: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        PREPARATION.encode_prompt(prompt)
    assert words in str(caught.value)


def test_a_prompt_that_no_engine_has_kv_blocks_for_is_refused_with_both_numbers() -> None:
    facts = EngineFacts(1000, 64, 8, 4, 3, "simulated", 0.0)
    with pytest.raises(InvalidRequestError, match=r"prompt has 12 tokens, but the KV cache of an engine holds 12"):
        Preparation(PREPARATION.codec, facts).encode_prompt("x" * 12)


@pytest.mark.parametrize(
    "prompt",
    [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), np.array([1, 2, 3], np.uint16), range(1, 4), list(np.arange(1, 4))],
)
def test_token_ids_may_come_in_any_sequence(prompt: Any) -> None:
    token_ids = PREPARATION.encode_prompt(prompt)
    assert token_ids == array("i", [1, 2, 3])


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 2.0}, "max_tokens must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens (5) must not be greater than max_tokens (4)"),
        ({"min_tokens": 10**30}, "min_tokens must be at most 2147483647"),
        ({"top_k": 10**30}, "top_k must be at most"),
        ({"temperature": 10**400}, "temperature must be a finite number"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty"),
        ({"n": 0}, "n must be"),
        ({"n": None}, "n must be an integer"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": 0.0}, "top_p must be a finite number in (0.0, 1.0]"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"seed": 0.5}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop must not hold an empty string"),
        ({"stop": ["a", ""]}, "stop must not hold an empty string"),
        ({"stop": [1]}, "stop must hold strings"),
        ({"stop": 5}, "stop must be a list"),
        ({"bad_words": "word"}, "bad_words must be a list"),
        ({"bad_words": [""]}, "bad_words"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1000]}, "stop_token_ids holds token id 1000, but the model has ids 0 to 999"),
        ({"logit_bias": {1000: 1.0}}, "logit_bias holds token id 1000"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias must map"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 10**6}, "prompt_logprobs"),
        ({"ignore_eos": 1}, "ignore_eos must be a bool"),
        ({"max_token": 5}, "unknown sampling parameter 'max_token'; did you mean 'max_tokens'"),
    ],
)
def test_bad_sampling_parameters_are_refused(params: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resolve(**params)
    assert words in str(caught.value)


def test_params_of_another_type_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="params must be a SamplingParams or None, got dict"):
        SamplingParams.of({"max_tokens": 3}, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"request_id": ""}, "request_id"),
        ({"request_id": 5}, "request_id"),
        ({"request_id": "x" * 1000}, "request_id"),
        ({"priority": 0.5}, "priority"),
        ({"priority": 2**40}, "priority"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": math.nan}, "timeout"),
        ({"timeout": "1"}, "timeout"),
        ({"session": 1}, "session"),
        ({"timeout": -1.0}, "timeout"),
        ({"engine": True}, "no engine True"),
        ({"engine": 2}, r"no engine 2; engines are \[0, 1\]"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        RequestOptions(**options).validate(engine_ids=(0, 1))


def test_keywords_override_params() -> None:
    params = SamplingParams.of(SamplingParams(temperature=0.5, max_tokens=3), {"max_tokens": 7})
    assert (params.temperature, params.max_tokens) == (0.5, 7)


def test_max_tokens_is_the_rest_of_the_context_by_default_and_at_most() -> None:
    assert resolve(num_prompt_tokens=10).max_tokens == 54
    assert resolve(num_prompt_tokens=10, max_tokens=1000).max_tokens == 54
    assert resolve(num_prompt_tokens=10, max_tokens=5).max_tokens == 5


def test_unset_parameters_take_the_models_defaults_and_else_vllms() -> None:
    codec = SimulatedTokenizer(SimulatedModel(vocab_size=1000))
    codec.generation_defaults = {"temperature": 0.6, "top_k": 20}
    sampling = Preparation(codec, FACTS).resolve(SamplingParams(top_k=-1), 10)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 0, 1.0)
    assert (resolve().temperature, resolve().repetition_penalty) == (1.0, 1.0)


def test_the_end_of_sequence_token_stops_unless_ignored() -> None:
    assert resolve(stop_token_ids=[7]).stop_token_ids == (7, 256)
    assert resolve(stop_token_ids=[7], ignore_eos=True).stop_token_ids == (7,)


def test_a_request_without_a_seed_is_given_one_of_its_own() -> None:
    assert len({resolve().seed for _ in range(10)}) == 10
    assert resolve(seed=5).seed == 5
    assert resolve(seed=-1).seed == 2**64 - 1


def test_a_callers_array_may_change_after_the_call() -> None:
    prompt = np.array([1, 2, 3], np.int32)
    encoded = PREPARATION.encode_prompt(prompt)
    prompt[:] = 9
    assert encoded.tolist() == [1, 2, 3]
