"""What a finished request gives: plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from asyncscale.messages import FinishReason


class Logprob(NamedTuple):
    """A token's log-probability and its rank.

    logprob: natural logarithm, of the model's raw distribution. rank: 1 for the most likely token.
    """

    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class Timing:
    """When what happened to a request, so far.

    Moments, as of time.monotonic() of the client's process; None while they have not come:
    arrival: of the call. queued: when it was sent to the engine that computed its first token, having been held back
    here while every engine was full. first_token, last_token: when they arrived, of any of its choices.

    Seconds, by the clock of that engine: queued_s: that it waited there for its first step, 0 until that is known.
    prefill_s: from its first step to its first token, with whatever came between when it was preempted.

    engine: the one that has it or finished it; scores: of every engine when it was sent there, by engine id: what the
    routing policy compares, least is best (of a policy of your own: `EngineLoad.score`).
    num_output_tokens: of all choices; longest_output: of the longest. num_cached_tokens: of the prompt, found in the
    prefix cache. num_preemptions: how often one of its choices lost its KV blocks to other requests, and was computed
    again. num_moves: how often it was sent anew, because an engine died or its connection was lost.
    """

    arrival: float
    queued: float | None
    queued_s: float
    prefill_s: float | None
    first_token: float | None
    last_token: float | None
    engine: int | None
    scores: Mapping[int, float]
    num_output_tokens: int
    longest_output: int
    num_cached_tokens: int
    num_preemptions: int
    num_moves: int

    @property
    def score(self) -> float | None:
        """What the engine scored when it was chosen."""
        return None if self.engine is None else self.scores.get(self.engine)

    @property
    def held_s(self) -> float | None:
        """Seconds from the call until it was queued at its engine."""
        return None if self.queued is None else self.queued - self.arrival

    @property
    def ttft(self) -> float | None:
        """Seconds from the call to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def decode_s(self) -> float | None:
        """Seconds from the first token to the last."""
        if self.first_token is None or self.last_token is None:
            return None
        return self.last_token - self.first_token

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first, of the longest choice."""
        return None if self.decode_s is None or self.longest_output < 2 else self.decode_s / (self.longest_output - 1)

    @property
    def e2e(self) -> float | None:
        """Seconds from the call to the last token."""
        return None if self.last_token is None else self.last_token - self.arrival


@dataclass(frozen=True, slots=True)
class ChoiceCompletion:
    """One of the n completions of a prompt.

    Logprobs: per token, {token id: Logprob} of the chosen and the most likely ones.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[dict[int, Logprob]] | None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request; `text`, `token_ids`, `finish_reason` and `logprobs` are those of the first choice.

    prompt_logprobs: per prompt token, {token id: Logprob}; None for the first, which nothing predicts.
    weight_versions: of the weights that made its tokens, in order: (0,) are those of the start, (0, 1) were changed
    once meanwhile. See `AsyncScaleClient.update_weights`.
    """

    request_id: str
    prompt_token_ids: list[int]
    choices: tuple[ChoiceCompletion, ...]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    timing: Timing
    weight_versions: tuple[int, ...] = (0,)

    if not TYPE_CHECKING:  # type checkers say as much of their own

        def __aiter__(self) -> NoReturn:
            raise TypeError("a Completion is all of it: read tokens with `async for` of the call itself, without await")

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        return self.choices[0].logprobs

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from asyncscale.notebook.completion_card import completion_html

        return completion_html(self)
