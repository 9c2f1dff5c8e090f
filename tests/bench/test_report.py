"""The report's arithmetic on a run made by hand."""

from __future__ import annotations

import pytest

from asyncscale.bench.replay import RequestRecord
from asyncscale.bench.report import Statistics, summarize
from asyncscale.bench.usage import Usage

MIB = 2**20

RECORDS = [
    RequestRecord(0.0, 10, [0.5, 0.6, 0.9]),  # TTFT 500 ms, TPOT 200 ms, ITL 100 and 300 ms
    RequestRecord(1.0, 20, [1.25, 1.35]),  # TTFT 250 ms, TPOT 100 ms, ITL 100 ms
    RequestRecord(1.5, 30, [3.0]),  # TTFT 1500 ms and nothing after it
    RequestRecord(1.5, 99, [1.6, 1.7], error="EngineDeadError: gone"),
    RequestRecord(1.5, 99, [], error="something later"),
]
BEFORE = {
    "client": Usage(1, 2.0, MIB, None),
    "engine-0": Usage(2, 5.0, MIB, None),
    "engine-1": Usage(3, 1.0, MIB, None),
}
AFTER = {
    "client": Usage(1, 2.006, 50 * MIB, 40 * MIB),
    "engine-0": Usage(2, 5.3, 100 * MIB, 60 * MIB),
    "engine-1": Usage(3, 1.6, 120 * MIB, None),
}


@pytest.fixture
def report():
    return summarize(RECORDS, 4.0, BEFORE, AFTER)


def test_totals_and_rates_count_successful_requests(report):
    assert (report.completed, report.failed, report.first_error) == (3, 2, "EngineDeadError: gone")
    assert (report.total_input_tokens, report.total_output_tokens) == (60, 6)
    assert (report.request_throughput, report.output_throughput, report.total_token_throughput) == (0.75, 1.5, 16.5)


def test_times_are_in_milliseconds(report):
    assert report.ttft_ms.mean == pytest.approx(750)
    assert report.ttft_ms.median == pytest.approx(500)
    assert report.ttft_ms.p99 == pytest.approx(500 + 0.98 * 1000)  # interpolated between the two highest
    assert (report.tpot_ms.mean, report.tpot_ms.median) == pytest.approx((150, 150))
    assert (report.itl_ms.mean, report.itl_ms.median) == pytest.approx((500 / 3, 100))


def test_cpu_time_is_per_generated_token(report):
    cpu = {name: figures.cpu_us_per_output_token for name, figures in report.processes.items()}
    assert cpu == pytest.approx({"client": 1000, "engine-0": 50_000, "engine-1": 100_000})
    assert report.engine_cpu_us_per_output_token == pytest.approx(150_000)


def test_memory_is_in_mib(report):
    assert [(f.peak_rss_mib, f.pss_mib) for f in report.processes.values()] == [(50, 40), (100, 60), (120, None)]


@pytest.mark.parametrize("before", [{}, BEFORE | {"engine-1": Usage(77, 1.0, MIB, None)}])
def test_cpu_time_of_an_engine_that_was_restarted_is_not_known(before):
    report = summarize(RECORDS, 4.0, before, AFTER)
    assert report.processes["engine-1"].cpu_us_per_output_token is None
    assert report.engine_cpu_us_per_output_token is None


def test_the_printed_block_has_the_well_known_lines(report):
    rows = {line[:34].strip(): line[34:].split() for line in str(report).splitlines()}
    assert rows["Successful requests:"] == ["3"]
    assert rows["Failed requests:"] == ["2"]
    assert rows["Benchmark duration (s):"] == ["4.00"]
    assert rows["Total input tokens:"] == ["60"]
    assert rows["Total generated tokens:"] == ["6"]
    assert rows["Request throughput (req/s):"] == ["0.75"]
    assert rows["Output token throughput (tok/s):"] == ["1.50"]
    assert rows["Total token throughput (tok/s):"] == ["16.50"]
    assert rows["TTFT (ms):"] == ["750.00", "500.00", "1480.00"]
    assert rows["CPU (us/output token):"] == ["1000.0", "50000.0", "100000.0", "150000.0"]
    assert rows["PSS at the end (MiB):"] == ["40", "60", "-"]
    assert "First error: EngineDeadError: gone" in str(report)


def test_machines_get_vllms_names(report):
    values = report.to_dict()
    assert values["mean_ttft_ms"] == pytest.approx(750)
    assert values["p99_itl_ms"] == report.itl_ms.p99
    assert values["processes"]["engine-0"]["peak_rss_mib"] == 100
    assert "ttft_ms" not in values


def test_a_run_without_any_success_has_no_times():
    report = summarize(RECORDS[3:], 1.0, BEFORE, AFTER)
    assert report.ttft_ms == report.tpot_ms == report.itl_ms == Statistics(None, None, None)
    assert report.processes["client"].cpu_us_per_output_token is None
    assert "TTFT (ms):" in str(report)
