"""What all engines of an owner have counted, through their deaths and restarts."""

from __future__ import annotations

import threading

from asyncscale.metrics.catalog import ENGINE_LAYOUT as LAYOUT
from asyncscale.metrics.engine_counters import read_file

_UP, _RESTARTS = map(LAYOUT.at, ("engine_up", "engine_restarts"))
_DEATHS, _HANGS = map(LAYOUT.at, ("engine_deaths", "engine_hangs"))


class EngineLedger:
    """::

        ledger.up(0, path)              # it is ready, and counts in that file
        ledger.down(0, hung=False)      # it died; what it has counted stays
        ledger.read()                   # {0: [...]}, numbers as in ENGINE_LAYOUT

    May be read by any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # or a reader might see an engine's counts twice, or not at all, as it dies
        self._paths: dict[int, str] = {}  # of the engines that are up
        self._before: dict[int, list[int]] = {}  # counted by those that were there before them

    def up(self, engine_id: int, path: str) -> None:
        """The engine takes requests, and counts in the file at `path`."""
        with self._lock:
            self._paths[engine_id] = path
            before = self._before.get(engine_id)
            if before is None:
                self._before[engine_id] = LAYOUT.zeros()
            else:
                before[_RESTARTS] += 1

    def down(self, engine_id: int, *, hung: bool) -> None:
        """The engine has died; its file is still there, if it was ever up. hung: it was killed because it did."""
        with self._lock:
            total = LAYOUT.without_gauges(self._counts(engine_id))
            total[_DEATHS] += 1
            total[_HANGS] += hung
            self._before[engine_id] = total
            self._paths.pop(engine_id, None)

    @property
    def engine_ids(self) -> frozenset[int]:
        """All engines that there were."""
        return frozenset(self._before)

    def read(self) -> dict[int, list[int]]:
        """The counts of every engine, in order."""
        with self._lock:
            return {engine_id: self._counts(engine_id) for engine_id in sorted(self._before)}

    def _counts(self, engine_id: int) -> list[int]:
        before = self._before.get(engine_id) or LAYOUT.zeros()
        path = self._paths.get(engine_id)
        if path is None:
            return list(before)
        now = read_file(path)
        total = LAYOUT.sum([before] if now is None else [before, now])
        total[_UP] = 1
        return total
