"""The dashboard as a picture: in JupyterLab, in a browser, in its light and its dark theme."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import nbformat
import pytest
from jupyter_kernel import WIDGET, kernel_environment

pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install 'asyncscale[browser]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'asyncscale[browser]'")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

IDLE = ".jp-Notebook-ExecutionIndicator[data-status=idle]"

CELLS = [
    "from asyncscale import AsyncScaleClient, SimulatedModel\n"
    "client = await AsyncScaleClient(SimulatedModel(), num_engines=2, max_num_seqs=4).start()\n"
    "client",
    "await client.dashboard()",
    "work = [client.generate('x', max_tokens=8000, ignore_eos=True, engine=0) for _ in range(2)]\n"
    "completion = await client.generate('<script>document.title = \"broken\"</script> $x^2$', max_tokens=5)\n"
    "completion",
    "await client.close(drain=False)",
]

# The colours of a piece of text and of what is behind it, as a browser computes them.
COLORS = """element => {
    let behind = element;
    while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """JupyterLab, with settings of its own, in a folder of its own: its address and that folder."""
    folder, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("jupyter")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": folder,
        "IdentityProvider.token": "secret",
        "LabApp.expose_app_in_browser": True,
        "LabApp.news_url": None,
    }
    folders = {f"JUPYTER{name}": str(home / name) for name in ("_CONFIG_DIR", "_DATA_DIR", "_RUNTIME_DIR")}
    labs = {f"JUPYTERLAB_{name}_DIR": str(home / name) for name in ("SETTINGS", "WORKSPACES")}
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
            + [f"--{name}={value}" for name, value in options.items()],
            env=kernel_environment() | folders | labs,
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(server, f"{url}/api?token=secret", home / "log")
        yield url, folder
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)


def wait_for_server(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(log.read_text()) from None
            time.sleep(0.05)


def contrast(colors: list[str]) -> float:
    """Of two colours, from 1 to 21. Source: WCAG 2.2, "contrast ratio"."""
    luminances = []
    for color in colors:
        parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    dark, light = sorted(luminances)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_the_dashboard_moves_and_can_be_read(lab: tuple[str, Path], theme: str) -> None:
    url, folder = lab
    path = folder / f"{theme}.ipynb"
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}  # else a dialog asks for it
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1100, "height": 1200})
            page.goto(f"{url}/lab/tree/{path.name}?token=secret&reset")
            page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
            command(page, "apputils:change-theme", theme=theme)
            page.wait_for_selector(f"body[data-jp-theme-name='{theme}']", state="attached")
            page.wait_for_selector(IDLE, state="attached", timeout=60_000)
            check_running(page, folder / f"{theme}.png")
            check_closed(page)
            command(page, "docmanager:save")
            page.wait_for_selector(".jp-mod-dirty", state="detached")
        finally:
            browser.close()
    saved = json.loads(path.read_text())
    assert WIDGET not in json.dumps([cell["outputs"] for cell in saved["cells"]])
    assert "the client is closed" in json.dumps(saved["cells"][1]["outputs"])


def command(page: Any, name: str, **arguments: Any) -> None:
    # Not to its end: the running of a cell is one that the picture is taken during.
    page.evaluate("([name, args]) => { window.jupyterapp.commands.execute(name, args); }", [name, arguments])


def run_cells(page: Any, *numbers: int) -> None:
    """The cells, counted from 0, of which the first one is selected."""
    for number in numbers:
        command(page, "notebook:run-cell-and-select-next")
        prompt = page.locator(".jp-CodeCell").nth(number).locator(".jp-InputPrompt")
        sync_api.expect(prompt).to_have_text(f"[{number + 1}]:", timeout=60_000)


def check_running(page: Any, picture: Path) -> None:
    """Two requests on one of two engines, of four slots each."""
    run_cells(page, 0, 1, 2)
    dashboard = page.locator(".jp-CodeCell").nth(1).locator(".widget-html-content")
    rows = dashboard.locator("tbody tr")
    page.wait_for_function(
        "row => row.textContent.includes('2 of 4')", arg=rows.nth(0).element_handle(), timeout=30_000
    )
    bars = [rows.nth(row).locator("[aria-hidden=true] > span").first for row in (0, 1)]
    widths = [bar.evaluate("bar => bar.getBoundingClientRect().width / bar.parentElement.clientWidth") for bar in bars]
    assert widths == pytest.approx([0.5, 0.0], abs=0.02)
    cards = [
        dashboard,
        *(page.locator(".jp-CodeCell").nth(cell).locator(".jp-OutputArea-output table") for cell in (0, 2)),
    ]
    for card in cards:
        for cell in card.locator("th, td").all():
            assert contrast(cell.evaluate(COLORS)) >= 7
    assert contrast([bars[0].evaluate(COLORS)[1], dashboard.evaluate(COLORS)[1]]) >= 3
    check_pixels(rows.nth(0).locator("td").nth(2).locator("[aria-hidden=true]"))
    assert page.title() != "broken"
    assert "<script>document.title" not in page.content()
    page.screenshot(path=picture)


def check_pixels(bar: Any) -> None:
    """The picture of a bar that is half full: blue, then not."""
    image = matplotlib.image.imread(io.BytesIO(bar.screenshot()))
    middle = image[image.shape[0] // 2]
    filled, empty = middle[len(middle) // 4], middle[3 * len(middle) // 4]
    assert filled[2] > filled[0] + 0.3
    assert abs(empty[2] - empty[0]) < 0.1


def check_closed(page: Any) -> None:
    """What stays is the last picture, and no widget."""
    run_cells(page, 3)
    output = page.locator(".jp-CodeCell").nth(1).locator(".jp-RenderedHTML")
    output.get_by_text("the client is closed").wait_for(timeout=30_000)
    assert page.locator(".jp-CodeCell").nth(1).locator(".widget-html-content").count() == 0
