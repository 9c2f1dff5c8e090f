"""An engine's records on their way to the owner: whole, bounded, and never waited for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from asyncscale import messages
from asyncscale.engine.log_relay import LogRelay


@pytest.fixture
def pipe() -> Iterator[tuple[Connection, Connection]]:
    owner, engine = Pipe()
    yield owner, engine
    owner.close()
    engine.close()


@pytest.fixture
def logger(pipe: tuple[Connection, Connection]) -> Iterator[logging.Logger]:
    relay, logger = LogRelay(pipe[1]), logging.getLogger("asyncscale.engine.of_a_test")
    logger.propagate = False
    logger.addHandler(relay)
    yield logger
    logger.removeHandler(relay)
    logger.setLevel(logging.NOTSET)


def received(owner: Connection) -> list[messages.Logged]:
    records = []
    while owner.poll():
        message = messages.decode(messages.from_engine_process_decoder, owner.recv_bytes())
        assert isinstance(message, messages.Logged)
        records.append(message)
    return records


def test_a_record_keeps_what_handlers_show(pipe: tuple[Connection, Connection], logger: logging.Logger) -> None:
    try:
        raise LookupError("lost")
    except LookupError:
        logger.exception("%d blocks", 7)
    [record] = received(pipe[0])
    assert (record.name, record.level, record.text) == (logger.name, logging.ERROR, "7 blocks")
    assert (record.template, record.path) == ("%d blocks", __file__)
    assert record.function == "test_a_record_keeps_what_handlers_show"
    assert record.error is not None
    assert record.error.endswith("LookupError: lost")


def test_an_owner_that_does_not_read_is_never_waited_for_and_told_what_it_missed(
    pipe: tuple[Connection, Connection], logger: logging.Logger
) -> None:
    count = 10_000
    for number in range(count):
        logger.error("number %d", number)
    first = received(pipe[0])
    assert 0 < len(first) < count
    assert [record.text for record in first] == [f"number {number}" for number in range(len(first))]
    logger.error("after")
    lost, after = received(pipe[0])
    assert lost.text == f"{count - len(first)} records were dropped while nobody read them"
    assert after.text == "after"


@pytest.mark.parametrize("letter", ["x", "\N{GRINNING FACE}"])
def test_long_records_are_cut(pipe: tuple[Connection, Connection], logger: logging.Logger, letter: str) -> None:
    try:
        raise LookupError(letter * 2**20)
    except LookupError:
        logger.exception(letter * 2**20)
    assert len(pipe[0].recv_bytes()) < 2**14  # in one piece


def test_text_that_is_no_unicode_arrives_all_the_same(
    pipe: tuple[Connection, Connection], logger: logging.Logger
) -> None:
    logger.error("cannot read %s", b"caf\xe9".decode(errors="surrogateescape"))
    [record] = received(pipe[0])
    assert record.text == "cannot read caf\\udce9"


def test_levels_are_those_that_the_owner_said_last(pipe: tuple[Connection, Connection]) -> None:
    relay = LogRelay(pipe[1])
    one, other = logging.getLogger("asyncscale.of_a_test"), logging.getLogger("asyncscale.of_another")
    relay.set_levels({one.name: logging.DEBUG, other.name: logging.ERROR})
    assert (one.level, other.level) == (logging.DEBUG, logging.ERROR)
    relay.set_levels({one.name: logging.INFO})
    assert (one.level, other.level) == (logging.INFO, logging.NOTSET)
    relay.set_levels({})
    assert one.level == logging.NOTSET


def test_an_owner_that_is_gone_is_no_error(pipe: tuple[Connection, Connection], logger: logging.Logger) -> None:
    pipe[0].close()
    logger.error("nobody hears this")
