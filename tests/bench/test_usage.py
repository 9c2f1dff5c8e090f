"""CPU time and memory of processes, against psutil."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest

from asyncscale.bench import usage
from asyncscale.bench.usage import cpu_seconds, parse_cpu_time, process_usage

MIB = 2**20


def test_figures_of_this_process_are_those_of_psutil():
    ours, theirs = process_usage(os.getpid()), psutil.Process()
    assert ours.cpu_s == pytest.approx(sum(theirs.cpu_times()[:2]), abs=0.1)
    assert ours.peak_rss >= theirs.memory_info().rss - MIB
    assert ours.pss is None or 0 < ours.pss <= theirs.memory_info().rss + MIB


def test_work_shows_as_cpu_time():
    before, start = process_usage(os.getpid()), time.process_time()
    while time.process_time() - start < 0.2:
        pass
    assert process_usage(os.getpid()).cpu_s - before.cpu_s >= 0.17


def test_a_process_that_is_gone_has_no_usage():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert process_usage(process.pid) is None


@pytest.mark.skipif(shutil.which("ps") is None, reason="no ps")
def test_ps_gives_the_same_where_there_is_no_proc():
    ours = usage._from_ps(os.getpid())
    assert ours.cpu_s == pytest.approx(process_usage(os.getpid()).cpu_s, abs=1.5)
    assert ours.peak_rss == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    with pytest.raises(ProcessLookupError):
        usage._from_ps(2**30)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:00.12", 0.12), ("12:34.56", 754.56), ("01:02:03", 3723), ("2-01:00:00", 176_400)]
)
def test_cpu_times_of_ps_are_understood(text, seconds):
    assert parse_cpu_time(text) == pytest.approx(seconds)


def test_cpu_seconds_are_those_of_the_process_and_a_dead_one_has_none():
    before = cpu_seconds(os.getpid())
    used = time.process_time()
    while time.process_time() < used + 0.05:
        pass
    assert 0.05 <= cpu_seconds(os.getpid()) - before < 1
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    with pytest.raises(ProcessLookupError):
        cpu_seconds(child.pid)
