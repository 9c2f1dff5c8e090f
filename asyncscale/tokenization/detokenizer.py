"""From a stream of tokens to a stream of text, for tokenizers whose tokens are bytes and for those whose are text.

Both hold back what later tokens may still change, so that the parts add up to the decoding of the whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping

_decode_utf8 = codecs.utf_8_decode
_NO_BYTES = b""
_MAX_WINDOW = 12
_KEPT = 4

TokenBytes = tuple[bytes, str | None]  # of one token: its bytes, and its text when they are whole characters


def token_bytes(data: bytes) -> TokenBytes:
    """An entry of the table that `ByteDetokenizer` reads."""
    try:
        return data, data.decode()
    except UnicodeDecodeError:
        return data, None


class ByteDetokenizer:
    """For tokenizers whose text is the UTF-8 decoding of all tokens' bytes in a row (byte-level BPE).

    table: token id -> its bytes; shared by all streams. Invalid bytes become U+FFFD, one for each maximal part of a
    character (Unicode 15, section 3.9), which is what both Rust's from_utf8_lossy and Python's "replace" do.
    """

    __slots__ = ("_pending", "_table")

    def __init__(self, table: Mapping[int, TokenBytes]) -> None:
        self._table = table
        self._pending = _NO_BYTES  # the beginning of a character

    def push(self, token_id: int) -> str:
        data, text = self._table[token_id]
        pending = self._pending
        if text is not None and not pending:
            return text
        data = pending + data
        text, used = _decode_utf8(data, "replace", False)
        self._pending = data[used:]
        return text

    def finish(self) -> str:
        pending, self._pending = self._pending, _NO_BYTES
        return pending.decode(errors="replace")


class WindowDetokenizer:
    """For all other tokenizers: decodes the last few tokens again and again, and takes what has been added at the end.

    decode: of a few token ids. piece: token id -> its string in the vocabulary, None for tokens that have no text.
    has_byte_fallback: whether pieces like <0xE2> stand for bytes. A run of those is held back until it ends, because
    one invalid byte changes the text of the whole run.

    Exact for decoders that work on each token alone, except for the beginning of the text and such runs
    (Replace, Metaspace, ByteFallback, Fuse, Strip at the beginning).
    """

    __slots__ = ("_decode", "_has_byte_fallback", "_piece", "_shown", "_window")

    def __init__(
        self, decode: Callable[[list[int]], str], piece: Callable[[int], str | None], has_byte_fallback: bool
    ) -> None:
        self._decode = decode
        self._piece = piece
        self._has_byte_fallback = has_byte_fallback
        self._window: list[int] = []
        self._shown = 0  # how many characters of the window's text are settled

    def push(self, token_id: int) -> str:
        piece = self._piece(token_id)
        if piece is None:
            return ""
        self._window.append(token_id)
        if self._has_byte_fallback and _is_byte(piece):
            return ""
        text = self._decode(self._window)
        certain = text.removesuffix("\ufffd")  # perhaps the beginning of a character
        added = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if len(self._window) >= _MAX_WINDOW and certain == text:
            self._shorten()
        return added

    def finish(self) -> str:
        rest = self._decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return rest

    def _shorten(self) -> None:
        """Keep a few tokens: what a decoder does to the beginning of a text must not be done to the next token."""
        kept = self._window[-_KEPT:]
        if text := self._decode(kept):
            self._window, self._shown = kept, len(text)


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
