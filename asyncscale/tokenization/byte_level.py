"""The byte-level alphabet of GPT-2: each byte is written as one printable character of a vocabulary's strings.

Source: bytes_to_unicode in https://github.com/openai/gpt-2/blob/master/src/encoder.py
"""

from __future__ import annotations

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}  # these bytes are written as themselves
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]  # and these as U+0100 and on
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def byte_level_bytes(piece: str) -> bytes:
    """The bytes that `piece` stands for; one with a character outside the alphabet (an added token) is its own text."""
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:
        return piece.encode()
