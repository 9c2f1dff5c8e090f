"""Where the engines of a generation meet: a folder of small files, in the private folder of their owner.

The owner makes it when the generation begins and removes it when that is over. So nobody waits there for the dead: who
finds the folder gone knows that there will be another generation.
"""

from __future__ import annotations

import contextlib
import os
import time
import urllib.parse
from pathlib import Path

from asyncscale.tandem.collective_errors import CollectiveError
from asyncscale.transport import remove_runtime_folder

# Engines come when their step is done, or when they have loaded what they had lost.
JOIN_TIMEOUT_S = 60.0

_POLL_S = 0.001


def open_meeting(folder: str, generation: int) -> None:
    """The owner's part: to be done before any engine hears of the generation."""
    os.mkdir(_path(folder, generation), 0o700)


def close_meeting(folder: str, generation: int) -> None:
    """The generation is over: who waits in its meeting, or comes late, gets a CollectiveError.

    Not an error when it was closed before, or when it was never opened.
    """
    remove_runtime_folder(str(_path(folder, generation)))


class Meeting:
    """An engine's part: tell the others something, and wait for what they tell::

        meeting = Meeting(folder, generation)
        meeting.put("address/0", b"...")
        address = meeting.get("address/1")

    Each key is put once. timeout: seconds that `get` waits. Every method raises CollectiveError when the meeting is
    closed, or when nobody comes in time.
    """

    def __init__(self, folder: str, generation: int, timeout: float = JOIN_TIMEOUT_S) -> None:
        self.path = _path(folder, generation)
        self._generation = generation
        self._timeout = timeout

    def put(self, key: str, value: bytes) -> None:
        """Let the others know."""
        file = self._file(key)
        aside = file.with_name(f"{file.name}.{os.getpid()}.partial")
        try:
            aside.write_bytes(value)
            aside.rename(file)  # at once: nobody reads half of it
        except FileNotFoundError:
            self.check_open()
            raise

    def get(self, key: str) -> bytes:
        """What was put under this key; waits until it is."""
        deadline = time.monotonic() + self._timeout
        while True:
            with contextlib.suppress(FileNotFoundError):
                return self._file(key).read_bytes()
            self.check_open()
            if time.monotonic() > deadline:
                raise CollectiveError(
                    f"generation {self._generation} was not complete within {self._timeout:g} s: no {key!r}"
                )
            time.sleep(_POLL_S)

    def has(self, key: str) -> bool:
        """Whether something was put under this key."""
        if self._file(key).exists():
            return True
        self.check_open()
        return False

    def check_open(self) -> None:
        """Raise CollectiveError when the generation is over."""
        if not self.path.exists():
            raise CollectiveError(f"generation {self._generation} is over")

    def _file(self, key: str) -> Path:
        return self.path / urllib.parse.quote(key, safe="")


def _path(folder: str, generation: int) -> Path:
    return Path(folder, f"generation-{generation}")
