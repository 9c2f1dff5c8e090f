"""What engines log, given to this process's own loggers and handlers."""

from __future__ import annotations

import logging
import os
from typing import Any

from asyncscale import messages

ROOT = "asyncscale"

# Lines of engines' starts that are remembered, so as to say them once.
_MAX_REMEMBERED = 1000


class EngineLogs:
    """Each record of an engine becomes one of the logger of the same name here: level, time and place are kept,
    `engine_id` is an attribute, and the message begins with "engine 0: ".

    What an engine says while it starts, the others say, too, and so does it when it is started again: the first one is
    heard. Two lines are the same when their text is; below WARNING, when their format is. DEBUG records are all heard.
    """

    def __init__(self) -> None:
        self._said: set[tuple[str, int, str]] = set()

    def take(self, engine_id: int, pid: int | None, message: messages.Logged, *, starting: bool) -> None:
        """An engine logged something."""
        if starting and message.level > logging.DEBUG and self._is_repeated(message):
            return
        logger = logging.getLogger(message.name)
        if logger.isEnabledFor(message.level):
            logger.handle(_record(engine_id, pid, message))

    def _is_repeated(self, message: messages.Logged) -> bool:
        same = message.text if message.level >= logging.WARNING else message.template
        key = (message.name, message.level, same)
        if key in self._said:
            return True
        if len(self._said) == _MAX_REMEMBERED:
            self._said.clear()
        self._said.add(key)
        return False


def wanted_levels() -> dict[str, int]:
    """From which level on this process hears of its loggers: of the root of asyncscale's tree, and of those in it that
    have one of their own."""
    manager = logging.Logger.manager
    loggers = [logging.getLogger(ROOT)]
    loggers += [
        logger
        for name, logger in list(manager.loggerDict.items())
        if name.startswith(f"{ROOT}.") and isinstance(logger, logging.Logger) and logger.level
    ]
    return {logger.name: max(logger.getEffectiveLevel(), manager.disable + 1) for logger in loggers}


def _record(engine_id: int, pid: int | None, message: messages.Logged) -> logging.LogRecord:
    fields: dict[str, Any] = {
        "name": message.name,
        "levelno": message.level,
        "levelname": logging.getLevelName(message.level),
        "msg": f"engine {engine_id}: {message.text}",
        "args": (),
        "pathname": message.path,
        "filename": os.path.basename(message.path),
        "module": os.path.splitext(os.path.basename(message.path))[0],
        "lineno": message.line,
        "funcName": message.function,
        "created": message.created,
        "msecs": message.created % 1 * 1000,
        "process": pid,
        "processName": f"engine-{engine_id}",
        "thread": None,
        "threadName": message.thread,
        "exc_text": message.error,
        "engine_id": engine_id,
    }
    return logging.makeLogRecord(fields)
