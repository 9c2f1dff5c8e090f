"""What a client needs of a tokenizer: text to token ids, and back as a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Message = Mapping[str, Any]


class Detokenizer(Protocol):
    """Text of one stream of tokens. All that it returns, concatenated, is the codec's `decode` of all the tokens."""

    def push(self, token_id: int) -> str:
        """The text that is certain now, perhaps none; never half a UTF-8 character."""

    def finish(self) -> str:
        """No more tokens come: the text that had been held back."""


class TextCodec(Protocol):
    """Tokenization for one model.

    vocab_size: number of token ids that the tokenizer knows (the model may have a few more).
    eos_token_ids: tokens that end an answer.
    generation_defaults: the checkpoint's own sampling defaults, by the names of SamplingParams.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def generation_defaults(self) -> Mapping[str, float | int]: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the checkpoint adds. Raises InvalidRequestError."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Their text. Ids that the tokenizer does not know have none."""

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **template_kwargs: Any) -> str:
        """The conversation as one text, in the model's own chat template. Raises InvalidRequestError."""

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> list[int]:
        """Token ids of `chat(...)`; the template writes all special tokens itself. Raises InvalidRequestError."""

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences that spell each word, alone and after a space."""

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """A new stream."""
