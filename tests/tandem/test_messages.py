"""The messages on the wire."""

from __future__ import annotations

import msgspec
import pytest

from asyncscale.messages import decode
from asyncscale.tandem.messages import Broken, GroupState, Met, Paused, Wake

Message = GroupState | Met | Paused | Broken | Wake

MESSAGES = [
    GroupState(),
    GroupState(7, 2, whole=True, wave=3, running=True, held=True),
    Met(2),
    Paused(2, 3, True),
    Broken(2),
    Wake(2, 3),
]


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    decoder = msgspec.msgpack.Decoder(Message)
    assert decode(decoder, msgspec.msgpack.encode(message)) == message


@pytest.mark.parametrize("message", [Paused(-1, 0, True), Wake(0, -1), Broken(-1), GroupState(-1)], ids=repr)
def test_numbers_that_cannot_be_are_refused(message: Message) -> None:
    decoder = msgspec.msgpack.Decoder(Message)
    assert decode(decoder, msgspec.msgpack.encode(message)) is None
