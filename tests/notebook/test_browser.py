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

# Of each element there: its text, its box, the colours of its text and of what is behind it, as a browser paints them
# (red, green, blue, alpha, 0 to 255). In one go: the dashboard replaces its elements ten times a second.
LOOK = """(root, selector) => [...root.querySelectorAll(selector)].map(element => {
    const painted = color => {
        const canvas = new OffscreenCanvas(1, 1).getContext('2d');
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const background = element => painted(getComputedStyle(element).backgroundColor);
    let behind = element;
    while (background(behind)[3] < 255) behind = behind.parentElement;
    const {x, y, width, height} = element.getBoundingClientRect();
    return {
        text: element.textContent,
        box: {x, y, width, height},
        colors: [painted(getComputedStyle(element).color), background(behind)],
    };
})"""


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


def contrast(colors: list[list[int]]) -> float:
    """Of two colours, from 1 to 21. Source: WCAG 2.2, "contrast ratio"."""
    luminances = []
    for red, green, blue, _ in colors:
        parts = [part / 255 for part in (red, green, blue)]
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
    # Braces: it need not come to its end, which for some is when the user has closed a dialog.
    page.evaluate("([name, args]) => { window.jupyterapp.commands.execute(name, args); }", [name, arguments])


def run_cells(page: Any, *numbers: int) -> None:
    """These cells, counted from 0."""
    for number in numbers:
        prompt = page.locator(".jp-CodeCell").nth(number).locator(".jp-InputPrompt")
        while (
            prompt.text_content() == "[ ]:"
        ):  # a notebook that is being drawn hears no keys, or its kernel is not there
            page.keyboard.press("Escape")  # the dialog that says so
            prompt.click()
            page.keyboard.press("Shift+Enter")
            page.wait_for_timeout(200)
        sync_api.expect(prompt).to_have_text(f"[{number + 1}]:", timeout=60_000)


def check_running(page: Any, picture: Path) -> None:
    """Two requests on one of two engines, of four slots each."""
    run_cells(page, 0, 1, 2)
    cells = [page.locator(".jp-CodeCell").nth(number).locator(".jp-OutputArea") for number in (0, 1, 2)]
    sync_api.expect(cells[1]).to_contain_text("2 of 4", timeout=30_000)
    for cell in cells:
        texts = cell.evaluate(LOOK, "th, td")
        assert texts
        assert min(contrast(text["colors"]) for text in texts) >= 7
    frames = cells[1].evaluate(LOOK, "tbody tr td:nth-child(3) > span:first-child")
    fillings = cells[1].evaluate(LOOK, "tbody tr td:nth-child(3) > span:first-child > span:first-child")
    shares = [filling["box"]["width"] / frame["box"]["width"] for filling, frame in zip(fillings, frames, strict=True)]
    assert shares == pytest.approx([0.5, 0.0], abs=0.02)
    behind = cells[1].evaluate(LOOK, "th")[0]["colors"][1]
    assert contrast([fillings[0]["colors"][1], behind]) >= 3
    check_half_blue(page.screenshot(clip=frames[0]["box"]))
    assert page.title() != "broken"
    assert page.locator(".jp-OutputArea script").count() == 0
    page.screenshot(path=picture)


def check_half_blue(png: bytes) -> None:
    """The picture of a bar that is half full."""
    image = matplotlib.image.imread(io.BytesIO(png))
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
