"""The command end to end: engines, front ends, table, and files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def scale(*options):
    command = [sys.executable, "-W", "error", "-m", "asyncscale.bench", "scale", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_chosen_sections_are_measured_printed_and_written(tmp_path):
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    result = scale("--quick", "--markdown", "--only", "streams,attach,idle", "--json", figures, "--plot", picture)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["streams", "attach", "idle"]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in result.stdout.splitlines()]
    assert cells[0] == ["section", "what", "measured", "target", "met"]
    assert "nan" not in result.stdout

    written = json.loads(figures.read_text())
    assert written["quick"] is True
    assert "python" in written["versions"]
    rows = written["rows"]
    assert [row["section"] for row in rows] == ["streams"] * 4 + ["attach", "idle"]
    assert [row["measured"] for row in rows] == [line[2] for line in cells[2:]]
    assert [row["figures"]["num_streams"] for row in rows[:3]] == [12, 125, 1250]
    assert rows[2]["figures"]["memory_kib"] > 0  # that of few streams may fit into pages that were there before
    assert all(value > 0 for row in rows[:5] for name, value in row["figures"].items() if name != "memory_kib")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "serve,nothing"), "no section 'nothing'; there are serve, serve-10000, seed"),
        (("--only", "idle", "--plot", "x.png"), "none of them is to be measured"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(options, message):
    result = scale(*options)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]
    assert "..." not in result.stderr.replace("NAME,...", "")
