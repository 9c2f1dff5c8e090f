"""Engines' records as records of this process."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest

from asyncscale import messages
from asyncscale.client.engine_logs import EngineLogs, wanted_levels
from asyncscale.messages import Logged

LOGGED = Logged(
    name="asyncscale.engine.core",
    level=logging.INFO,
    text="loaded in 2 s",
    template="loaded in %d s",
    created=1234.5,
    path="/somewhere/core.py",
    line=7,
    function="load",
)


def test_a_record_is_one_of_the_logger_of_that_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="asyncscale")
    EngineLogs().take(3, 4711, msgspec.structs.replace(LOGGED, error="Traceback: lost"), starting=False)
    [record] = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == (LOGGED.name, "INFO", "engine 3: loaded in 2 s")
    assert (record.created, record.msecs, record.process) == (1234.5, 500, 4711)
    assert (record.filename, record.module, record.lineno, record.funcName) == ("core.py", "core", 7, "load")
    assert vars(record)["engine_id"] == 3
    assert "Traceback: lost" in caplog.text


def test_what_no_handler_is_to_see_is_not_made(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="asyncscale")
    EngineLogs().take(0, 1, LOGGED, starting=False)
    assert caplog.records == []


def test_what_all_engines_say_while_they_start_is_heard_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="asyncscale")
    logs = EngineLogs()
    for engine_id in range(3):
        logs.take(engine_id, 1, msgspec.structs.replace(LOGGED, text=f"loaded in {engine_id} s"), starting=True)
    assert caplog.messages == ["engine 0: loaded in 0 s"]
    caplog.clear()
    for engine_id in range(2):  # what differs may be what matters
        warning = msgspec.structs.replace(LOGGED, level=logging.WARNING, text=f"cannot read file {engine_id}")
        logs.take(engine_id, 1, warning, starting=True)
        logs.take(engine_id, 1, warning, starting=True)
    assert caplog.messages == ["engine 0: cannot read file 0", "engine 1: cannot read file 1"]
    caplog.clear()
    for engine_id in range(2):
        logs.take(engine_id, 1, LOGGED, starting=False)
    assert len(caplog.messages) == 2


def test_the_levels_that_engines_are_told_are_those_in_force_here(caplog: pytest.LogCaptureFixture) -> None:
    root, part = logging.getLogger("asyncscale"), "asyncscale.engine.of_this_test"
    assert wanted_levels()["asyncscale"] == root.getEffectiveLevel()
    caplog.set_level(logging.INFO, logger="asyncscale")
    caplog.set_level(logging.DEBUG, logger=part)
    assert wanted_levels()["asyncscale"] == logging.INFO
    assert wanted_levels()[part] == logging.DEBUG
    logging.disable(logging.ERROR)
    try:
        assert set(wanted_levels().values()) == {logging.ERROR + 1}
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    "defect",
    [
        {"name": "root"},
        {"name": "asyncscaled"},
        {"level": -1},
        {"text": "x" * 2**14},
        {"error": "x" * 2**14},
        {"created": -1.0},
        {"line": -1},
    ],
    ids=lambda defect: next(iter(defect)),
)
def test_what_no_engine_of_ours_would_log_is_dropped(defect: dict[str, Any]) -> None:
    def decoded(message: Logged) -> object:
        return messages.decode(messages.from_engine_process_decoder, messages.encoder.encode(message))

    assert decoded(LOGGED) == LOGGED
    assert decoded(msgspec.structs.replace(LOGGED, **defect)) is None
