"""What notebooks show of clients, completions and requests."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from asyncscale import AsyncScaleClient, ChoiceCompletion, Completion, SimulatedModel, Timing
from asyncscale.notebook.engine_rows import EngineRow, rows_html, rows_text
from asyncscale.notebook.token_rates import TokenRates

HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="alert(2)"> $x^2$ &amp; \u202eevil\n\n  indented'


class Elements(HTMLParser):
    """The elements of a fragment, which must be balanced, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_fits_any_theme(html: str) -> None:
    elements = Elements(html)
    assert elements.tags.isdisjoint({"script", "style", "img", "link", "iframe"})
    assert not any(name.startswith("on") for name in elements.attributes)
    # The page's own colours, or of its theme with something for pages without one, or half transparent.
    for value in re.findall(r"(?:color|background|border[a-z-]*): ([^;\"]+)", html):
        assert re.fullmatch(r"var\(--jp-[a-z0-9-]+, #[0-9a-f]{6}\)|currentColor|none|.*rgba\(.*\)|collapse|3px", value)


def completion(text: str, n: int = 1) -> Completion:
    choices = tuple(ChoiceCompletion(index, text, [1, 2], "stop", None) for index in range(n))
    timing = Timing(
        arrival=0.0,
        queued=0.25,
        queued_s=0.001,
        prefill_s=0.05,
        first_token=0.0123,
        last_token=2.5,
        engine=1,
        scores={1: 0.0},
        num_output_tokens=2 * n,
        longest_output=2,
        num_cached_tokens=3,
        num_preemptions=0,
        num_moves=1,
    )
    return Completion("<b>id</b>", [1] * 5, choices, None, timing)


@pytest.mark.parametrize("n", [1, 3])
def test_a_completion_shows_its_text_as_it_is(n: int) -> None:
    html = completion(HOSTILE, n)._repr_html_()
    check_fits_any_theme(html)
    elements = Elements(html)
    assert elements.text.count(HOSTILE) == n
    assert "<b>id</b>" in elements.text
    assert html.count("<pre ") == n  # where a notebook looks for no formulas
    for shown in ("12.3 ms", "2.50 s", "250.0 ms", "5, 3 cached", "'stop'", "TTFT", "moves"):
        assert shown in elements.text
    assert "preemptions" not in elements.text


async def test_a_client_shows_itself_in_every_state() -> None:
    client = AsyncScaleClient(SimulatedModel(), num_engines=2, max_num_seqs=2)
    shown = [client._repr_html_()]
    async with client:
        generations = [client.generate("<i>x", max_tokens=1000, ignore_eos=True) for _ in range(7)]
        async for loads in client.watch_loads():
            if all(load.running == 2 for load in loads):
                break
        shown += [client._repr_html_(), generations[1]._repr_html_()]
    shown.append(client._repr_html_())
    shown.append(generations[1]._repr_html_())
    for html in shown:
        check_fits_any_theme(html)
    new, running, generation, closed, ended = (Elements(html).text for html in shown)
    assert "not started" in new
    assert "await client.start()" in new
    assert running.count("2 of 2") == 2
    assert "3 requests of this client wait for a free slot" in running
    assert "await client.dashboard()" in running
    assert "ipc://" in running
    assert "running" in generation
    assert "await" in generation
    assert "closed" in closed
    assert "ClientClosedError" in ended


async def test_the_key_of_a_client_that_others_reach_over_tcp_is_not_shown() -> None:
    async with AsyncScaleClient(SimulatedModel(), num_engines=1, host="127.0.0.1") as client:
        key = client.address.partition("key=")[2]
        async with AsyncScaleClient.attach(client.address) as attached:
            for html in (client._repr_html_(), attached._repr_html_()):
                assert key not in html
                assert "?key=..." in html
                assert "simulated model" in html
        assert key not in AsyncScaleClient.attach(client.address)._repr_html_()


def test_bars_stay_in_their_frames_and_text_says_the_same() -> None:
    rows = [
        EngineRow(0, "ready", 3, 40, 4, 1.2, 0, 12345.6),
        EngineRow(10, "dead", 0, 0, 0, 0.0, 8, 0.0),
    ]
    html = rows_html(rows)
    check_fits_any_theme(html)
    for bar in re.findall(r'aria-hidden="true" style="display: inline-block.*?</span></span>', html):
        widths = [float(width) for width in re.findall(r"width: ([0-9.]+)%", bar)]
        assert sum(widths) <= 100.1
    text = rows_text(rows).splitlines()
    assert [line.split()[0] for line in text] == ["engine", "0", "10"]
    assert text[0].split()[-2:] == ["tokens/s", "restarts"]
    assert text[1].split()[-2:] == ["12,346", "0"]
    calm = rows_text([rows[0]._replace(tokens_per_s=None)])
    assert "tokens/s" not in calm
    assert "restarts" not in calm


def test_rates_are_of_the_last_seconds() -> None:
    rates = TokenRates()
    assert rates.update({0: 1000}, 50.0) == {}
    assert rates.update({0: 1100, 1: 7}, 50.9) == {}
    assert rates.update({0: 1200, 1: 50}, 51.25) == {0: 160.0, 1: 40.0}
    assert rates.update({0: 1200, 1: 50}, 53.0) == {0: 160.0, 1: 40.0}  # perhaps there is no news
    assert rates.update({0: 1200, 1: 150}, 53.25) == {0: 0.0, 1: 50.0}
    assert rates.update({0: 1200, 1: 150}, 55.75) == {0: 0.0, 1: 0.0}
    assert rates.update({0: 1300, 1: 150}, 90.0) == {}
