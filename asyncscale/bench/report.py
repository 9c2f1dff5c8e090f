"""Figures of a run, with the names and meanings of vLLM's `bench serve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from asyncscale.bench.replay import RequestRecord
from asyncscale.bench.usage import Usage

_MIB = 2**20
_LABEL_WIDTH, _COLUMN_WIDTH = 34, 12


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of times in milliseconds; all None when there were none."""

    mean: float | None
    median: float | None
    p99: float | None

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Statistics:
        """times_s: seconds. Percentiles are interpolated linearly."""
        if not times_s:
            return cls(None, None, None)
        times_ms = 1000 * np.asarray(times_s)
        median, p99 = np.percentile(times_ms, [50, 99])
        return cls(float(times_ms.mean()), float(median), float(p99))


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """cpu_us_per_output_token: user and system time of this process over all generated tokens. Memory in MiB."""

    cpu_us_per_output_token: float | None
    peak_rss_mib: float
    pss_mib: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """Tokens and times are of successful requests. Rates are per second of `duration` (seconds).

    ttft_ms: from a request's intended arrival to its first token. tpot_ms: mean time per token after the first, of each
    request with at least two. itl_ms: every pause between two tokens of a request.
    """

    completed: int
    failed: int
    first_error: str | None
    duration: float
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    ttft_ms: Statistics
    tpot_ms: Statistics
    itl_ms: Statistics
    processes: dict[str, ProcessFigures]

    @property
    def engine_cpu_us_per_output_token(self) -> float | None:
        """Of all engines together; None when it is not known of each."""
        each = [f.cpu_us_per_output_token for name, f in self.processes.items() if name != "client"]
        known = [value for value in each if value is not None]
        return sum(known) if known and len(known) == len(each) else None

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON; statistics under vLLM's names, such as mean_ttft_ms."""
        values = asdict(self)
        for name in ("ttft_ms", "tpot_ms", "itl_ms"):
            values |= {f"{kind}_{name}": value for kind, value in values.pop(name).items()}
        return values | {"engine_cpu_us_per_output_token": self.engine_cpu_us_per_output_token}

    def __str__(self) -> str:
        totals: list[tuple[str, float, int]] = [
            ("Successful requests:", self.completed, 0),
            ("Failed requests:", self.failed, 0),
            ("Benchmark duration (s):", self.duration, 2),
            ("Total input tokens:", self.total_input_tokens, 0),
            ("Total generated tokens:", self.total_output_tokens, 0),
            ("Request throughput (req/s):", self.request_throughput, 2),
            ("Output token throughput (tok/s):", self.output_throughput, 2),
            ("Total token throughput (tok/s):", self.total_token_throughput, 2),
        ]
        lines = [_line(label, [_number(value, digits)]) for label, value, digits in totals]
        if self.first_error is not None:
            lines.append(f"First error: {self.first_error}")
        lines += ["", *self._latency_lines(), "", *self._process_lines()]
        return "\n".join(lines)

    def _latency_lines(self) -> list[str]:
        rows = {"TTFT (ms):": self.ttft_ms, "TPOT (ms, excl. 1st token):": self.tpot_ms, "ITL (ms):": self.itl_ms}
        lines = [_line("", ["Mean", "Median", "P99"])]
        for label, s in rows.items():
            lines.append(_line(label, [_number(value, 2) for value in (s.mean, s.median, s.p99)]))
        return lines

    def _process_lines(self) -> list[str]:
        figures = self.processes.values()
        cpu = [f.cpu_us_per_output_token for f in figures]
        return [
            _line("", [*self.processes, "all engines"]),
            _line("CPU (us/output token):", [_number(v, 1) for v in (*cpu, self.engine_cpu_us_per_output_token)]),
            _line("Peak RSS (MiB):", [_number(f.peak_rss_mib, 0) for f in figures]),
            _line("PSS at the end (MiB):", [_number(f.pss_mib, 0) for f in figures]),
        ]


def summarize(
    records: Sequence[RequestRecord], duration: float, before: Mapping[str, Usage], after: Mapping[str, Usage]
) -> Report:
    """The figures of one run.

    duration: seconds. before, after: what each process had used when the run began and ended, by name. The CPU time of
    an engine that was restarted in between is not known.
    """
    good = [record for record in records if record.error is None]
    errors = [record.error for record in records if record.error is not None]
    times = [record.token_times_s for record in good]
    input_tokens, output_tokens = sum(record.num_prompt_tokens for record in good), sum(map(len, times))
    return Report(
        completed=len(good),
        failed=len(errors),
        first_error=errors[0] if errors else None,
        duration=duration,
        total_input_tokens=input_tokens,
        total_output_tokens=output_tokens,
        request_throughput=len(good) / duration,
        output_throughput=output_tokens / duration,
        total_token_throughput=(input_tokens + output_tokens) / duration,
        ttft_ms=Statistics.of([r.token_times_s[0] - r.arrival_s for r in good if r.token_times_s]),
        tpot_ms=Statistics.of([(t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1]),
        itl_ms=Statistics.of([pause for t in times for pause in np.diff(t)]),
        processes={name: _figures(before.get(name), usage, output_tokens) for name, usage in after.items()},
    )


def _figures(before: Usage | None, after: Usage, output_tokens: int) -> ProcessFigures:
    cpu = None
    if before is not None and before.pid == after.pid and output_tokens:
        cpu = 1e6 * (after.cpu_s - before.cpu_s) / output_tokens
    return ProcessFigures(cpu, after.peak_rss / _MIB, None if after.pss is None else after.pss / _MIB)


def _line(label: str, columns: Sequence[str]) -> str:
    return f"{label:<{_LABEL_WIDTH}}" + "".join(f"{column:>{_COLUMN_WIDTH}}" for column in columns)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
