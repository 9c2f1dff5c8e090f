from __future__ import annotations

import pytest

from asyncscale.config import SimulatedModel
from asyncscale.errors import InvalidRequestError
from asyncscale.tokenization.codec import TextCodec
from asyncscale.tokenization.loading import load_codec


@pytest.fixture
def codec() -> TextCodec:
    return load_codec(SimulatedModel(vocab_size=2000))


def test_text_is_its_bytes(codec: TextCodec) -> None:
    assert codec.encode("hé") == [104, 0xC3, 0xA9]
    assert codec.decode(codec.encode("naïve 😀")) == "naïve 😀"


def test_other_tokens_are_words_and_eos_is_special(codec: TextCodec) -> None:
    assert codec.eos_token_ids == {256}
    assert codec.decode([104, 1234, 256, 257]) == "h w1234 w257"
    assert codec.decode([104, 256], skip_special_tokens=False) == "h<eos>"
    assert codec.decode([-1, 2000, 1999]) == " w1999"


def test_a_chat_has_a_line_per_message(codec: TextCodec) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert codec.chat(messages) == "system: Be brief.\nuser: Hi\nassistant: "
    assert bytes(codec.encode_chat(messages, add_generation_prompt=False)) == b"system: Be brief.\nuser: Hi\n"


def test_what_is_wrong_is_said(codec: TextCodec) -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        codec.encode("\ud800")
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        codec.chat([])


def test_the_rest_of_the_interface(codec: TextCodec) -> None:
    assert codec.vocab_size == 2000
    assert codec.generation_defaults == {}
    assert codec.encode_bad_words(["ab", "c"]) == ((97, 98), (99,))
