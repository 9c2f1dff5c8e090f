"""What an engine logs, on its way to the owner's handlers: it has no terminal and no files of its own."""

from __future__ import annotations

import logging
import select
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection

from asyncscale import messages

ROOT = "asyncscale"

# Of one record, in bytes of UTF-8. All of it must be less than 16,384: the lifeline sends that in one piece, so that a
# pipe with any room takes it whole, and an engine that is stopped midway leaves no half whose rest its owner waits for.
_MAX_TEXT = 6000
_MAX_ERROR = 6000
_MAX_NAME = 500


class LogRelay(logging.Handler):
    """Sends each record over the lifeline, and never waits for an owner that does not read: then records are dropped,
    counted, and that is said when it reads again.

    ::

        relay = LogRelay(lifeline)
        relay.set_levels({"asyncscale": logging.INFO})      # what the owner wants to hear
        logging.getLogger("asyncscale").addHandler(relay)
    """

    def __init__(self, lifeline: Connection) -> None:
        super().__init__()
        self._lifeline = lifeline
        self._room = select.poll()
        self._room.register(lifeline, select.POLLOUT)
        self._num_dropped = 0
        self._leveled: set[str] = set()

    def set_levels(self, levels: Mapping[str, int]) -> None:
        """Give these loggers these levels, and none to those that were given one before."""
        for name in self._leveled - levels.keys():
            logging.getLogger(name).setLevel(logging.NOTSET)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        self._leveled = set(levels)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = _message(record)
        except Exception:  # of arguments that cannot be formatted
            self.handleError(record)
            return
        if self._num_dropped and self._send(_lost(record, self._num_dropped)):
            self._num_dropped = 0
        if self._num_dropped or not self._send(message):
            self._num_dropped += 1

    def _send(self, message: messages.Logged) -> bool:
        # A local stream socket is writable while three quarters of its buffer are free: then it takes far more than
        # one record, and this does not block.
        if not self._room.poll(0):
            return False
        try:
            self._lifeline.send_bytes(messages.encoder.encode(message))
        except OSError:  # the owner is gone, and this process ends
            return False
        return True


def _message(record: logging.LogRecord) -> messages.Logged:
    error = record.exc_text
    if error is None and record.exc_info:
        error = "".join(traceback.format_exception(*record.exc_info)).rstrip()
    return messages.Logged(
        name=_shortened(record.name, _MAX_NAME),
        level=record.levelno,
        text=_shortened(record.getMessage(), _MAX_TEXT),
        template=_shortened(str(record.msg), _MAX_NAME),
        created=record.created,
        path=_shortened(record.pathname, _MAX_NAME),
        line=record.lineno,
        function=_shortened(record.funcName or "", _MAX_NAME),
        thread=_shortened(record.threadName or "", _MAX_NAME),
        error=error and _shortened(error, _MAX_ERROR, keeps_end=True),
    )


def _shortened(text: str, max_bytes: int, *, keeps_end: bool = False) -> str:
    """What of it fits, and can be encoded; of a traceback the end, which says most."""
    encoded = text.encode("utf8", errors="backslashreplace")
    kept = encoded[-max_bytes:] if keeps_end else encoded[:max_bytes]
    return kept.decode(errors="ignore")


def _lost(record: logging.LogRecord, count: int) -> messages.Logged:
    text = f"{count} records were dropped while nobody read them"
    return messages.Logged(
        ROOT, logging.WARNING, text, text, record.created, __file__, _lost.__code__.co_firstlineno, "_lost"
    )
