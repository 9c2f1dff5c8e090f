from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from asyncscale.config import CheckpointFiles, SimulatedModel
from asyncscale.tokenization.byte_level import byte_level_bytes
from asyncscale.tokenization.codec import TextCodec
from asyncscale.tokenization.detokenizer import ByteDetokenizer, token_bytes
from asyncscale.tokenization.loading import load_codec
from asyncscale.tokenization.simulated import SimulatedTokenizer
from asyncscale.tokenization.tokenizer import Tokenizer as CheckpointTokenizer
from asyncscale.tokenization.tokenizer import TokenizerParts

SPACE = "\u2581"


@pytest.fixture(scope="module")
def smollm2(smollm2_files: CheckpointFiles) -> TextCodec:
    return load_codec(smollm2_files)


def small_codec(pieces: Sequence[str], decoder: decoders.Decoder | None, **options: bool) -> TextCodec:
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], **options))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("→ added é", special=False), AddedToken("é", special=False)])
    return CheckpointTokenizer(TokenizerParts(backend, None, frozenset(), {}), "small")


BYTE_LEVEL = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġthe", "ðŁ", "ĺĢ", "ĊĊ", "âĤ", "¬Ġ"]
PIECES = [
    SPACE,
    SPACE * 2,
    f"{SPACE}a",
    "a",
    "é",
    f"b{SPACE}",
    "\ufffd",
    " ",
    "<0xZZ>",
    *(f"<0x{i:02X}>" for i in range(256)),
]
LLAMA = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
SMALL_CODECS = {
    "byte-level": small_codec(BYTE_LEVEL, decoders.ByteLevel()),
    "byte-level in a sequence": small_codec(BYTE_LEVEL, decoders.Sequence([decoders.ByteLevel()])),
    "llama": small_codec(PIECES, decoders.Sequence(LLAMA), byte_fallback=True),
    "gemma": small_codec(PIECES, decoders.Sequence(LLAMA[:3]), byte_fallback=True),
    "strip": small_codec(PIECES, decoders.Sequence([*LLAMA[:3], decoders.Strip(" ", 6, 0)]), byte_fallback=True),
    "metaspace": small_codec(PIECES[:8], decoders.Metaspace()),
    "none": small_codec(PIECES[:8], None),
    "simulated": SimulatedTokenizer(SimulatedModel(vocab_size=300)),
}


ID_OF_BYTE = {byte_level_bytes(letter)[0]: i for i, letter in enumerate(BYTE_LEVEL[:256])}


def check(codec: TextCodec, token_ids: list[int], skip_special_tokens: bool) -> None:
    stream = codec.detokenizer(skip_special_tokens)
    parts = [stream.push(token_id) for token_id in token_ids]
    assert "".join(parts) + stream.finish() == codec.decode(token_ids, skip_special_tokens)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), skip=st.booleans())
@pytest.mark.parametrize("name", SMALL_CODECS)
def test_any_tokens_of_a_small_vocabulary_add_up(name: str, data: st.DataObject, skip: bool) -> None:
    codec = SMALL_CODECS[name]
    ids = st.integers(0, codec.vocab_size + 2) | st.integers(0, 8)
    check(codec, data.draw(st.lists(ids, max_size=60)), skip)


@settings(max_examples=400, deadline=None)
@given(token_ids=st.lists(st.integers(0, 49_160), max_size=40), skip=st.booleans())
def test_any_tokens_of_the_real_vocabulary_add_up(smollm2: TextCodec, token_ids: list[int], skip: bool) -> None:
    check(smollm2, token_ids, skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), skip=st.booleans())
@example("👩‍👩‍👧 漢字 naïve\n\n\t१२३", True)
def test_whole_text_needs_no_end(smollm2: TextCodec, text: str, skip: bool) -> None:
    token_ids = smollm2.encode(text)
    check(smollm2, token_ids, skip)
    stream = smollm2.detokenizer(skip)
    shown = "".join(map(stream.push, token_ids))
    if smollm2.decode(token_ids, False) == text:  # its vocabulary lacks a few bytes of rare characters
        assert shown == smollm2.decode(token_ids, skip)


@settings(max_examples=1000, deadline=None)
@given(
    chunks=st.lists(st.binary(max_size=6) | st.sampled_from([b"\xf0\x9f", b"\x98", b"\xe2\x82", b"\xed\xa0", b"\xf4"]))
)
def test_invalid_bytes_are_replaced_as_rust_does(chunks: list[bytes]) -> None:
    """tokenizers decodes bytes with Rust's from_utf8_lossy; its ByteLevel decoder shows what that does."""
    data = b"".join(chunks)
    ids = [ID_OF_BYTE[byte] for byte in data]
    assert SMALL_CODECS["byte-level"].decode(ids) == data.decode(errors="replace")
    stream = ByteDetokenizer({i: token_bytes(chunk) for i, chunk in enumerate(chunks)})
    assert "".join(map(stream.push, range(len(chunks)))) + stream.finish() == data.decode(errors="replace")


@pytest.mark.parametrize("name", ["byte-level", "llama", "metaspace"])
def test_text_that_cannot_change_is_shown_at_once(name: str) -> None:
    codec = SMALL_CODECS[name]
    stream = codec.detokenizer(skip_special_tokens=True)
    (token_id,) = codec.encode("a")
    assert [stream.push(token_id) for _ in range(50)] == ["a"] * 50
    assert stream.finish() == ""


def test_a_character_split_over_tokens_is_shown_when_it_is_whole(smollm2: TextCodec) -> None:
    token_ids = smollm2.encode("😀!")
    stream = smollm2.detokenizer(skip_special_tokens=True)
    assert [stream.push(token_id) for token_id in token_ids] == [""] * (len(token_ids) - 2) + ["😀", "!"]


def test_a_run_of_byte_tokens_is_shown_when_it_ends() -> None:
    codec = SMALL_CODECS["llama"]
    ids = [PIECES.index(f"<0x{byte:02X}>") for byte in "é".encode()]
    stream = codec.detokenizer(skip_special_tokens=True)
    assert [stream.push(token_id) for token_id in [*ids, PIECES.index("a")]] == ["", "", "éa"]


def test_the_end_of_a_stream_shows_what_is_broken(smollm2: TextCodec) -> None:
    stream = smollm2.detokenizer(skip_special_tokens=True)
    assert stream.push(smollm2.encode("😀")[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@pytest.mark.parametrize("name", ["llama", "strip", "metaspace", "none"])
@pytest.mark.parametrize("beginning", [[], ["a"]])
def test_a_long_run_of_spaces_is_not_stripped_within_the_text(name: str, beginning: list[str]) -> None:
    pieces = [*beginning, *[SPACE] * 40, "a"]
    check(SMALL_CODECS[name], [PIECES.index(piece) for piece in pieces], skip_special_tokens=True)
