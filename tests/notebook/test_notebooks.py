"""The notebooks run from top to bottom in a real kernel, with the real model, and leave nothing running."""

from __future__ import annotations

from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_kernel import kernel_environment
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
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert set(psutil.Process().children(recursive=True)) <= children


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_with_its_outputs_and_without_traces_of_a_machine(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert all(cell.outputs for cell in cells if cell.cell_type == "code" and "print" in cell.source)
    text = path.read_text(encoding="utf8")
    for folder in (Path.home(), path.parents[1]):
        assert f"{folder}/" not in text
