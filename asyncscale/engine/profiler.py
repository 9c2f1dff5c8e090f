"""Where an engine's thread spends its time, on request."""

from __future__ import annotations

import cProfile
import pstats

_MAX_FUNCTIONS = 60


class Profiler:
    """cProfile of the thread that calls `profile`, from one call to the next."""

    def __init__(self) -> None:
        self._profile: cProfile.Profile | None = None

    def profile(self, is_start: bool) -> list[dict[str, object]] | None:
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
        if profile is not None:
            profile.disable()
        return _functions(pstats.Stats(profile))


def _functions(stats: pstats.Stats) -> list[dict[str, object]]:
    profiles = stats.get_stats_profile().func_profiles.items()
    slowest = sorted(profiles, key=lambda item: item[1].tottime, reverse=True)[:_MAX_FUNCTIONS]
    return [
        {
            "function": name if entry.line_number == 0 else f"{entry.file_name}:{entry.line_number}({name})",
            "calls": int(entry.ncalls.split("/")[0]),
            "own_s": entry.tottime,
            "cumulative_s": entry.cumtime,
        }
        for name, entry in slowest
    ]
