"""What a client needs from a tokenizer, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from asyncscale.config import ModelSource, SimulatedModel


class Detokenizer(Protocol):
    """One choice's tokens to text, as they come."""

    def push(self, token_id: int) -> str:
        """The text that is certain now."""

    def finish(self) -> str:
        """The rest, when no more tokens come."""


class TextCodec(Protocol):
    """Text to token ids and back. Safe to use for many requests at once."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""

    @property
    def generation_defaults(self) -> Mapping[str, float | int]:
        """Sampling parameters that the model's authors recommend."""

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the model's own tokenizer adds."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of all the tokens."""

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> list[int]:
        """Token ids of a conversation, by the model's chat template. Raises InvalidRequestError."""

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Every token sequence that spells one of the words."""

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """For one choice of one request."""


def load_codec(source: ModelSource) -> TextCodec:
    """The tokenizer of a model. Raises ModelLoadError."""
    if isinstance(source, SimulatedModel):
        from asyncscale.tokenization.simulated import SimulatedTokenizer

        return SimulatedTokenizer(source)
    from asyncscale.tokenization.tokenizer import load_tokenizer

    return load_tokenizer(source)
