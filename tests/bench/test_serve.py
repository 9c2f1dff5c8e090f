"""The command end to end, with real engine processes that run the simulated model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from asyncscale.bench.workload import corpus, lognormal_requests

SIMULATED = ("--model", "simulated", "--num-engines", "2", "--sim-base-ms", "0.5", "--sim-decode-us", "1")


def serve(*options):
    command = [sys.executable, "-W", "error", "-m", "asyncscale.bench", "serve", *SIMULATED, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def rows(output):
    return {line[:34].strip(): line[34:].split() for line in output.splitlines()}


@pytest.mark.parametrize("extra", [(), ("--warmup", "--no-uvloop", "--read-text")], ids=["default", "other loop"])
def test_a_generated_workload_is_served_to_the_last_token(tmp_path, extra):
    path = tmp_path / "figures.json"
    sizes = ("--num-prompts", 40, "--mean-in", 60, "--mean-out", 30, "--seed", 3, "--rate", 400)
    result = serve(*sizes, "--max-num-seqs", 8, "--json", path, *extra)
    assert (result.returncode, result.stderr) == (0, "")
    expected = lognormal_requests(corpus().encode(), 40, 400.0, 60, 30, seed=3)
    num_in = sum(len(request.prompt) for request in expected)
    num_out = sum(request.sampling["max_tokens"] for request in expected)

    printed = rows(result.stdout)
    assert printed["Successful requests:"] == ["40"]
    assert printed["Failed requests:"] == ["0"]
    assert printed["Total input tokens:"] == [str(num_in)]
    assert printed["Total generated tokens:"] == [str(num_out)]
    assert printed[""] == ["client", "engine-0", "engine-1", "all", "engines"]
    assert all(float(value) > 0 for name in ("TTFT (ms):", "ITL (ms):") for value in printed[name])

    figures = json.loads(path.read_text())
    assert (figures["completed"], figures["failed"], figures["first_error"]) == (40, 0, None)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (num_in, num_out)
    assert figures["output_throughput"] == pytest.approx(num_out / figures["duration"])
    assert figures["duration"] >= expected[-1].arrival_s
    assert figures["processes"].keys() == {"client", "engine-0", "engine-1"}
    assert all(process["peak_rss_mib"] > 5 for process in figures["processes"].values())
    assert figures["configuration"]["max_num_seqs"] == 8
    assert figures["configuration"]["rate"] == 400
    assert "python" in figures["versions"]


def test_prompts_of_a_file_are_served_and_failures_are_counted(tmp_path):
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    lines = [
        {"prompt": "twelve bytes", "max_tokens": 7, "ignore_eos": True},
        {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True, "temperature": 0.9, "seed": 1},
        {"prompt": "fails", "max_tokens": 0},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    result = serve("--prompts", prompts, "--json", path)
    assert result.returncode == 1
    assert "First error: InvalidRequestError: max_tokens must be at least 1" in result.stdout
    figures = json.loads(path.read_text())
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (15, 12)
    assert figures["configuration"]["rate"] == "inf"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", 0), "must be greater than 0"),
        (("--num-prompts", 0), "must be at least 1"),
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model", "/no/such/model"), "/no/such/model"),
        (("--max-num-seqs", 0), "max_num_seqs must be at least 1"),
    ],
)
def test_wrong_options_end_with_one_line_that_names_them(options, message):
    result = serve(*options)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
