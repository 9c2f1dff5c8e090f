"""The notebooks run from top to bottom in a real kernel, with the real model, and leave nothing running."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib.image
import nbformat
import psutil
import pytest
from jupyter_kernel import WIDGET, kernel_environment
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_top_to_bottom(path: Path) -> None:
    children = set(psutil.Process().children(recursive=True))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources=resources).execute(env=kernel_environment())
    outputs = outputs_of(notebook.cells)
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert set(psutil.Process().children(recursive=True)) <= children


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_with_its_outputs_and_without_traces_of_a_machine(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    shows = ("print(", "plt.show()", "dashboard()")
    assert all(
        cell.outputs for cell in cells if cell.cell_type == "code" and any(show in cell.source for show in shows)
    )
    text = path.read_text(encoding="utf8")
    assert WIDGET not in text  # who reads the file has no kernel that a widget could ask
    for folder in (Path.home(), path.parents[1]):
        assert f"{folder}/" not in text


def test_plots_can_be_read_on_white_and_on_black() -> None:
    pictures = [
        matplotlib.image.imread(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
        for path in NOTEBOOKS
        for output in outputs_of(nbformat.read(path, as_version=4).cells)
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 4
    for picture in pictures:
        assert picture[0, 0, 3] == 0  # no background
        ink = picture[picture[..., 3] == 1][:, :3].mean(axis=1)
        assert ink.min() > 0.2
        assert ink.max() < 0.8


def outputs_of(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    return [output for cell in cells for output in cell.get("outputs", ())]
