"""The tokenizer of a checkpoint, as a `TextCodec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from asyncscale.errors import InvalidRequestError
from asyncscale.tokenization.byte_level import byte_level_bytes
from asyncscale.tokenization.chat import ChatTemplate
from asyncscale.tokenization.codec import Detokenizer, Message
from asyncscale.tokenization.detokenizer import ByteDetokenizer, TokenBytes, WindowDetokenizer, token_bytes

if TYPE_CHECKING:
    import tokenizers


class TokenizerParts(msgspec.Struct, frozen=True):
    """What a checkpoint says about its tokenization.

    backend: text to ids, without padding and truncation. chat_template: None when there is none.
    eos_token_ids, generation_defaults: as in `TextCodec`.
    """

    backend: tokenizers.Tokenizer
    chat_template: ChatTemplate | None
    eos_token_ids: frozenset[int]
    generation_defaults: dict[str, float | int]


class Tokenizer:
    """A `TextCodec` over a `tokenizers.Tokenizer`. Safe to use from several threads."""

    def __init__(self, parts: TokenizerParts, name: str) -> None:
        self._backend = parts.backend
        self._chat_template = parts.chat_template
        self._name = name
        self.eos_token_ids = parts.eos_token_ids
        self.generation_defaults: Mapping[str, float | int] = parts.generation_defaults

    @cached_property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=True)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **template_kwargs: Any) -> str:
        if self._chat_template is None:
            raise InvalidRequestError(
                f"the model {self._name} has no chat template; use generate() with a whole prompt"
            )
        return self._chat_template.render(messages, add_generation_prompt, template_kwargs)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> list[int]:
        text = self.chat(messages, add_generation_prompt, **template_kwargs)
        return self._encode(text, add_special_tokens=False)

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        sequences: list[tuple[int, ...]] = []
        for word in words:
            bare = word.lstrip() or word
            alone = tuple(self._encode(bare, add_special_tokens=False))
            after_space = tuple(self._encode(" " + bare, add_special_tokens=False))
            sequences.append(alone)
            if after_space[-len(alone) :] != alone:  # else the first one bans it too
                sequences.append(after_space)
        return tuple(sequence for sequence in sequences if sequence)

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        pieces = self._shown_pieces if skip_special_tokens else self._pieces
        if self._is_byte_level:
            return ByteDetokenizer(pieces.as_bytes)
        return WindowDetokenizer(self._decode_all, pieces.__getitem__, self._has_byte_fallback)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequestError(f"the text cannot be encoded: {error}") from None

    def _decode_all(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=False)

    @cached_property
    def _pieces(self) -> _Pieces:
        return _Pieces(self._backend, frozenset())

    @cached_property
    def _shown_pieces(self) -> _Pieces:
        added = self._backend.get_added_tokens_decoder()
        return _Pieces(self._backend, frozenset(token_id for token_id, token in added.items() if token.special))

    @cached_property
    def _decoder(self) -> dict[str, Any]:
        decoder = self._backend.decoder
        return {} if decoder is None else msgspec.json.decode(decoder.__getstate__())

    @cached_property
    def _is_byte_level(self) -> bool:
        return self._decoder.get("type") == "ByteLevel"

    @cached_property
    def _has_byte_fallback(self) -> bool:
        steps = [self._decoder, *self._decoder.get("decoders", ())]
        return any(step.get("type") == "ByteFallback" for step in steps)


class _Pieces(dict[int, str | None]):
    """Token id -> its string in the vocabulary, None for one that is unknown or `hidden`. Filled as tokens are seen."""

    def __init__(self, backend: tokenizers.Tokenizer, hidden: frozenset[int]) -> None:
        self._backend = backend
        self._hidden = hidden
        self.as_bytes = _Bytes(self)

    def __missing__(self, token_id: int) -> str | None:
        piece = None if token_id in self._hidden else self._backend.id_to_token(token_id)
        self[token_id] = piece
        return piece


class _Bytes(dict[int, TokenBytes]):
    """Token id -> what a byte-level decoder makes of it. Filled as tokens are seen."""

    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces

    def __missing__(self, token_id: int) -> TokenBytes:
        piece = self._pieces[token_id]
        entry = self[token_id] = token_bytes(b"" if piece is None else byte_level_bytes(piece))
        return entry
