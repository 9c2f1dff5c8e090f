"""CPU time and memory of a process that runs, on Linux and macOS."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_KIB = 1024


@dataclass(frozen=True, slots=True)
class Usage:
    """What process `pid` has used.

    cpu_s: user and system time in seconds. peak_rss: bytes; where it is not kept, the present size.
    pss: bytes now, pages shared with other processes divided among them; None where it is not kept.
    """

    pid: int
    cpu_s: float
    peak_rss: int
    pss: int | None


def process_usage(pid: int) -> Usage | None:
    """What process `pid` has used so far; None when there is no such process."""
    try:
        return _from_proc(pid) if _has_proc() else _from_ps(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None


def cpu_seconds(pid: int) -> float:
    """User and system time of process `pid` so far; to the microsecond, where Linux keeps a clock for it.

    Raises ProcessLookupError.
    """
    if _has_proc():
        try:
            return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) computes
        except OSError:
            raise ProcessLookupError(pid) from None
    usage = process_usage(pid)
    if usage is None:
        raise ProcessLookupError(pid)
    return usage.cpu_s


def _has_proc() -> bool:
    return Path("/proc/self/stat").exists()


def _from_proc(pid: int) -> Usage:
    folder = Path(f"/proc/{pid}")
    # The second field is the program's name in parentheses, and may hold spaces; see proc(5).
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    peak_rss = _kib_field(folder / "status", "VmHWM:")
    try:
        pss = _kib_field(folder / "smaps_rollup", "Pss:")
    except (FileNotFoundError, PermissionError):
        pss = None
    return Usage(pid, ticks / os.sysconf("SC_CLK_TCK"), peak_rss or 0, pss)


def _kib_field(path: Path, name: str) -> int | None:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * _KIB
    return None


def _from_ps(pid: int) -> Usage:
    result = subprocess.run(["ps", "-o", "time=,rss=", "-p", str(pid)], capture_output=True, text=True)
    if result.returncode:
        raise ProcessLookupError(pid)
    cpu_time, rss = result.stdout.split()
    return Usage(pid, parse_cpu_time(cpu_time), int(rss) * _KIB, None)


def parse_cpu_time(text: str) -> float:
    """Seconds, from ps's [[days-]hours:]minutes:seconds[.hundredths]."""
    days, _, clock = text.rpartition("-")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds + 86_400 * int(days or 0)
