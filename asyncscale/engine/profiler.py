"""Where an engine's thread spends its time, on request."""

from __future__ import annotations

import cProfile
from types import CodeType

_MAX_FUNCTIONS = 60


class Profiler:
    """cProfile of the thread that calls `profile`, from one call to the next."""

    def __init__(self) -> None:
        self._profile: cProfile.Profile | None = None

    def profile(self, is_start: bool = True) -> list[dict[str, object]] | None:
        """Start with True, and get the result with False: the functions that took the most time of their own first.

        Each is {"function", "calls", "own_s", "cumulative_s"}, times in seconds. The profiler slows what it measures.
        Raises RuntimeError when it is started twice or ended without a start.
        """
        if is_start is not True and is_start is not False:
            raise ValueError(f"is_start must be true or false, got {is_start!r}")
        if is_start == (self._profile is not None):
            raise RuntimeError("the profiler is running already" if is_start else "the profiler is not running")
        if is_start:
            self._profile = cProfile.Profile()
            self._profile.enable()
            return None
        profile, self._profile = self._profile, None
        return [] if profile is None else _slowest(profile)


def _slowest(profile: cProfile.Profile) -> list[dict[str, object]]:
    profile.disable()
    entries = sorted(profile.getstats(), key=lambda entry: entry.inlinetime, reverse=True)
    return [
        {
            "function": _name(entry.code),
            "calls": entry.callcount,
            "own_s": entry.inlinetime,
            "cumulative_s": entry.totaltime,
        }
        for entry in entries[:_MAX_FUNCTIONS]
    ]


def _name(code: CodeType | str) -> str:
    """Of a function; built-in ones are a string already."""
    return code if isinstance(code, str) else f"{code.co_filename}:{code.co_firstlineno}({code.co_name})"
