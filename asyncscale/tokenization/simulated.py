"""The tokenizer of a simulated model: readable text without a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncscale.config import SimulatedModel
from asyncscale.errors import InvalidRequestError
from asyncscale.tokenization.chat import check_messages
from asyncscale.tokenization.codec import Detokenizer, Message
from asyncscale.tokenization.detokenizer import ByteDetokenizer, TokenBytes, token_bytes

EOS_TOKEN_ID = 256


class SimulatedTokenizer:
    """A `TextCodec`: ids 0 to 255 are bytes of UTF-8 text, 256 ends an answer, the others are words like " w1234"."""

    def __init__(self, model: SimulatedModel) -> None:
        self.vocab_size = model.vocab_size
        self.eos_token_ids = frozenset({EOS_TOKEN_ID})
        self.generation_defaults: Mapping[str, float | int] = {}
        self._tables = {skip: _Table(model.vocab_size, skip) for skip in (False, True)}

    def encode(self, text: str) -> list[int]:
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the text is not valid Unicode: {error}") from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        table = self._tables[skip_special_tokens]
        return b"".join(table[token_id][0] for token_id in token_ids).decode(errors="replace")

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **template_kwargs: Any) -> str:
        lines = [f"{message['role']}: {message.get('content') or ''}\n" for message in check_messages(messages)]
        return "".join(lines) + ("assistant: " if add_generation_prompt else "")

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> list[int]:
        return self.encode(self.chat(messages, add_generation_prompt, **template_kwargs))

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(self.encode(word)) for word in words)

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        return ByteDetokenizer(self._tables[skip_special_tokens])


class _Table(dict[int, TokenBytes]):
    """Filled as tokens are seen."""

    def __init__(self, vocab_size: int, skip_special_tokens: bool) -> None:
        self._vocab_size = vocab_size
        self._eos = b"" if skip_special_tokens else b"<eos>"

    def __missing__(self, token_id: int) -> TokenBytes:
        if not 0 <= token_id < self._vocab_size:
            data = b""
        elif token_id < EOS_TOKEN_ID:
            data = bytes([token_id])
        else:
            data = self._eos if token_id == EOS_TOKEN_ID else f" w{token_id}".encode()
        entry = self[token_id] = token_bytes(data)
        return entry
