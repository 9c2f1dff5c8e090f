"""The command end to end: fresh processes that start engines of the simulated model."""

from __future__ import annotations

import subprocess
import sys


def test_each_phase_of_a_start_is_timed_and_phases_follow_each_other():
    command = [sys.executable, "-W", "error", "-m", "asyncscale.bench", "start", "--model", "simulated", "--times", "1"]
    options = ["--num-engines", "1", "--option", "max_num_seqs=8"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    header, *lines = result.stdout.splitlines()
    assert header.startswith("simulated, 1 engines")
    medians = {name.strip(): float(rest.split()[0]) for name, _, rest in (line.partition("median") for line in lines)}
    *phases, cpu = medians
    assert phases == ["interpreter", "imports", "engines ready", "first token", "closed"]
    times = [medians[phase] for phase in phases]
    assert times == sorted(times)
    assert times[0] > 0
    assert medians[cpu] > 0


def test_an_option_that_there_is_not_ends_it_with_an_error():
    command = [sys.executable, "-m", "asyncscale.bench", "start", "--model", "simulated", "--option", "max_num_seq=8"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "did you mean 'max_num_seqs'" in result.stderr
    assert "asyncscale.bench: error" in result.stderr.splitlines()[-1]
