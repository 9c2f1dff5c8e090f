"""The picture of `scale`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

from asyncscale.bench.plot import check_plot, plot
from asyncscale.bench.table import Row

SEED = [
    Row("seed", "", {"num_clients": 1, "ttft_mean_ms": 33.0, "published_ttft_mean_ms": 13_176.0}, ""),
    Row("seed", "", {"num_clients": 2, "ttft_mean_ms": 30.0, "published_ttft_mean_ms": 67.5}, ""),
    Row("seed", "", {"num_clients": 2, "ttft_mean_ms": 900.0, "published_ttft_mean_ms": None}, ""),
]
THROUGHPUT = [Row("throughput", "", {"num_engines": 1, "num_clients": 1, "tokens_per_s": 1e6}, "")]
STREAMS = [Row("streams", "", {"num_streams": 100, "client_cpu_us": 8.0, "engines_cpu_us": 9.0}, "")]


def test_each_section_that_it_shows_makes_it_wider_and_the_background_is_transparent(tmp_path: Path) -> None:
    one, all_three = tmp_path / "one.png", tmp_path / "all.png"
    plot([*STREAMS, Row("idle", "", {"cpu": 0.0}, "")], one)
    plot([*SEED, *THROUGHPUT, *STREAMS], all_three)
    small, large = matplotlib.image.imread(one), matplotlib.image.imread(all_three)
    assert large.shape[1] == 3 * small.shape[1]
    assert large.shape[2] == 4
    assert large[0, 0, 3] == 0
    assert large[..., 3].max() == 1


def test_what_cannot_be_drawn_is_said_before_anything_is_measured() -> None:
    check_plot(["idle", "seed"])
    with pytest.raises(ValueError, match="none of them"):
        check_plot(["idle", "attach"])


def test_without_a_plot_matplotlib_is_not_imported() -> None:
    code = "import sys, asyncscale.bench.scale; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
