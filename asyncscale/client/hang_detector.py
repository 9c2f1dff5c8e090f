"""Tells an engine that hangs from one that is busy, however long its step takes. No I/O, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass

# How fast time without progress counts, by what the process does meanwhile. One that was stopped from outside goes on
# when somebody wants it to, and nobody waits for that; one that computes may be in an operation that takes its time.
_STOPPED, _SILENT, _COMPUTING = 10.0, 1.0, 0.1


@dataclass(frozen=True, slots=True)
class Observation:
    """An engine at one moment.

    ticks, resting: see `asyncscale.progress`. stopped: the process is, as by SIGSTOP. cpu_s: seconds of CPU that it has
    used so far, None where the system does not tell.
    """

    ticks: int
    resting: bool
    stopped: bool = False
    cpu_s: float | None = None


class HangDetector:
    """::

        detector = HangDetector(timeout=10.0, interval=1.0)
        if detector.observe(observation, now):        # every `interval` seconds
            ...                                       # it hangs

    timeout: seconds for which a process that has work to do, and computes nothing, shows no progress. One that is
    stopped hangs after a tenth of that, also without work; one that uses CPU after ten times as long.
    """

    def __init__(self, timeout: float, interval: float) -> None:
        self._timeout = timeout
        self._interval = interval
        self._last: tuple[Observation, float] | None = None
        self._stuck_s = 0.0

    def observe(self, seen: Observation, now: float) -> bool:
        """Whether the engine hangs."""
        if self._last is not None:
            last, then = self._last
            # When more time has passed, it was the observer that was stopped, and perhaps all of its processes with it.
            elapsed = min(now - then, 2 * self._interval)
            rate = _rate(last, seen)
            self._stuck_s = 0.0 if rate is None else self._stuck_s + rate * elapsed
        self._last = seen, now
        return self._stuck_s >= self._timeout


def _rate(last: Observation, seen: Observation) -> float | None:
    """How fast the time between two observations counts; None: the engine is well."""
    if last.stopped and seen.stopped and seen.ticks == last.ticks:
        return _STOPPED
    if seen.resting or seen.ticks != last.ticks:
        return None
    if seen.cpu_s is not None and last.cpu_s is not None and seen.cpu_s > last.cpu_s:
        return _COMPUTING
    return _SILENT
