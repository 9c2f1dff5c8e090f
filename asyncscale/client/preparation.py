"""From a caller's arguments to a request that an engine can run as it stands.

Encoded, checked, every default filled in.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from asyncscale.client.token_ids import make_token_ids
from asyncscale.errors import InvalidRequestError
from asyncscale.messages import EngineFacts
from asyncscale.params import MAX_BAD_WORD_TOKENS, Sampling, SamplingParams
from asyncscale.tokenization.codec import TextCodec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Prompt: TypeAlias = "str | Sequence[int] | npt.NDArray[np.integer]"

_UINT64 = 2**64 - 1
_MAX_ID_LENGTH = 512


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The arguments of `generate` and `chat` that are no sampling parameters; see there."""

    request_id: str | None = None
    priority: int = 0
    timeout: float | None = None
    engine: int | None = None
    session: str | None = None

    def validate(self, engine_ids: Sequence[int]) -> None:
        """Raises InvalidRequestError, naming the argument."""
        request_id, priority, timeout = self.request_id, self.priority, self.timeout
        if request_id is not None and not (isinstance(request_id, str) and 0 < len(request_id) <= _MAX_ID_LENGTH):
            raise InvalidRequestError(
                f"request_id must be a string of 1 to {_MAX_ID_LENGTH} characters, got {_describe(request_id)}"
            )
        if not isinstance(priority, int) or isinstance(priority, bool) or not -(2**31) <= priority < 2**31:
            raise InvalidRequestError(f"priority must be an integer of 32 bits, got {priority!r}")
        if timeout is not None and (
            not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout > 0
        ):
            raise InvalidRequestError(f"timeout must be a number of seconds greater than 0, got {timeout!r}")
        if self.engine is not None and (type(self.engine) is not int or self.engine not in engine_ids):
            raise InvalidRequestError(f"there is no engine {self.engine!r}; engines are {list(engine_ids)}")
        if self.session is not None and not isinstance(self.session, str):
            raise InvalidRequestError(f"session must be a string, got {self.session!r}")


def _draw_seed() -> int:
    return random.getrandbits(64)


@dataclass(frozen=True)
class Preparation:
    """What a client needs to know of model and engines to check a request without asking them.

    draw_seed: gives a request that has no seed one of 64 bits.
    """

    codec: TextCodec
    facts: EngineFacts
    draw_seed: Callable[[], int] = _draw_seed

    def encode_prompt(self, prompt: Prompt) -> array[int]:
        """Token ids of a prompt, at least one, int32, the caller's no more. Raises InvalidRequestError."""
        try:
            token_ids = make_token_ids(self._encode_text(prompt) if isinstance(prompt, str) else prompt)
        except (TypeError, OverflowError):
            raise InvalidRequestError(
                f"prompt must be a string or a sequence of token ids, got {_describe(prompt)}{_cure(prompt)}"
            ) from None
        self.check_prompt(token_ids)
        return token_ids

    def _encode_text(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"prompt is not valid Unicode: {error}") from None
        return self.codec.encode(text)

    def check_prompt(self, token_ids: array[int]) -> None:
        """Raises InvalidRequestError when the ids are out of range, or too many for the context or the KV cache."""
        facts = self.facts
        count = len(token_ids)
        if count == 0:
            raise InvalidRequestError("prompt is empty: it must have at least one token")
        if min(token_ids) < 0 or max(token_ids) >= facts.vocab_size:
            bad = next(token_id for token_id in token_ids if not 0 <= token_id < facts.vocab_size)
            raise InvalidRequestError(f"token id {bad} is out of range: the model has ids 0 to {facts.vocab_size - 1}")
        if count >= facts.max_model_len:
            raise InvalidRequestError(
                f"prompt has {count} tokens, but the model's context is {facts.max_model_len} tokens, "
                "of which at least one must be left for the answer"
            )
        cache = facts.num_blocks * facts.block_size
        if count >= cache:
            raise InvalidRequestError(f"prompt has {count} tokens, but the KV cache of an engine holds {cache}")

    def resolve(self, params: SamplingParams, num_prompt_tokens: int) -> Sampling:
        """The caller's parameters with the model's defaults, as concrete values. Raises InvalidRequestError."""
        defaults = self.codec.generation_defaults
        room = self.facts.max_model_len - num_prompt_tokens
        stop_token_ids = set(params.stop_token_ids or ())
        self._check_ids("stop_token_ids", stop_token_ids)
        bias = params.logit_bias or {}
        self._check_ids("logit_bias", bias)
        bad_words = self.codec.encode_bad_words(params.bad_words) if params.bad_words else ()
        if sum(map(len, bad_words)) > MAX_BAD_WORD_TOKENS:
            raise InvalidRequestError(f"bad_words must be at most {MAX_BAD_WORD_TOKENS} tokens long, all together")
        if not params.ignore_eos:
            stop_token_ids |= {token_id for token_id in self.codec.eos_token_ids if token_id < self.facts.vocab_size}
        return Sampling(
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            min_tokens=params.min_tokens,
            temperature=float(params.default("temperature", defaults)),
            top_p=float(params.default("top_p", defaults)),
            top_k=max(0, params.default("top_k", defaults)),
            min_p=float(params.default("min_p", defaults)),
            repetition_penalty=float(params.default("repetition_penalty", defaults)),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            seed=self.draw_seed() if params.seed is None else params.seed & _UINT64,
            stop_token_ids=tuple(sorted(stop_token_ids)),
            bad_words_token_ids=bad_words,
            logit_bias=tuple((int(token_id), float(value)) for token_id, value in bias.items()),
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
        )

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if token_id >= self.facts.vocab_size:
                last = self.facts.vocab_size - 1
                raise InvalidRequestError(f"{name} holds token id {token_id}, but the model has ids 0 to {last}")


def _cure(prompt: object) -> str:
    """For what somebody may well take for a prompt."""
    if hasattr(prompt, "tolist") and not hasattr(prompt, "__array_interface__"):  # of numpy: has a wrong shape or type
        return ": pass its .tolist()"
    match prompt:
        case [str() | [*_], *_]:
            return ". One call is one prompt: `await asyncio.gather(*map(client.generate, prompts))` runs many at once"
        case [{"role": _}, *_]:
            return ": pass a conversation to `client.chat`"
    return ""


def _describe(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
