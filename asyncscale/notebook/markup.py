"""Small pieces of HTML that fit into any notebook: light or dark, without scripts, readable when styles are stripped.

Colours come from JupyterLab's theme where there is one. Text has whatever colour the page gives it. All arguments are
text, and are escaped here, but those named `html`.
"""

from __future__ import annotations

import html as _html
from collections.abc import Iterable, Sequence

BLUE = "var(--jp-brand-color1, #2f8fd8)"
GREEN = "var(--jp-success-color1, #3f9f4f)"
AMBER = "var(--jp-warn-color1, #d8892f)"
RED = "var(--jp-error-color1, #d9534f)"
_FAINT = "rgba(128, 128, 128, 0.25)"
_FONT = "var(--jp-ui-font-family, system-ui, sans-serif)"
_CODE_FONT = "var(--jp-code-font-family, monospace)"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Text as it is, whatever is in it."""
    return text if isinstance(text, Html) else Html(_html.escape(text))


def card(title: str, *parts: Html) -> Html:
    """What one object looks like."""
    edge = f"border-left: 3px solid {_FAINT}; padding: 2px 0 2px 12px; margin: 4px 0"
    style = f"font: 13px/1.5 {_FONT}; {edge}; overflow-x: auto"
    return Html(f'<div style="{style}"><div style="margin-bottom: 4px">{escape(title)}</div>{"".join(parts)}</div>')


def strong(text: str) -> Html:
    return Html(f"<strong>{escape(text)}</strong>")


def code(text: str) -> Html:
    return Html(f'<code style="font-family: {_CODE_FONT}; background: none">{escape(text)}</code>')


def badge(text: str, color: str) -> Html:
    """A state: a dot in its colour, and its name."""
    dot = f'<span aria-hidden="true" style="color: {color}">&#9679;</span>'
    return Html(f"{dot} {escape(text)}")


def note(*texts: str) -> Html:
    """A line of less importance."""
    return Html(f'<div style="opacity: 0.75">{"".join(map(escape, texts))}</div>')


def text_block(text: str) -> Html:
    """Text of a model, with its line breaks: nothing in it is markup, nor mathematics, nor turns its surroundings."""
    style = (
        f"font: 13px/1.5 {_CODE_FONT}; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; "
        "max-height: 24em; overflow-y: auto; margin: 4px 0; padding: 0; background: none; border: none"
    )
    # A line break after <pre> is dropped; and in <pre>, unlike elsewhere, dollars do not begin a formula.
    return Html(f'<pre class="tex2jax_ignore" dir="auto" style="{style}">\n{escape(text)}</pre>')


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Cells are text or HTML; numbers are aligned to the right where all of a column begin with a digit."""
    body = [[escape(cell) for cell in row] for row in rows]
    right = [all(row[column][:1].isdigit() for row in body) for column in range(len(head))]
    align = ["right" if is_right else "left" for is_right in right]
    cell_style = [
        f"padding: 2px 12px 2px 0; text-align: {side}; white-space: nowrap; font-variant-numeric: tabular-nums"
        for side in align
    ]
    header = "".join(
        f'<th scope="col" style="{style}; font-weight: 600">{escape(name)}</th>'
        for name, style in zip(head, cell_style, strict=True)
    )
    lines = "".join(
        "<tr>"
        + "".join(f'<td style="{style}">{cell}</td>' for cell, style in zip(row, cell_style, strict=True))
        + "</tr>"
        for row in body
    )
    return Html(
        f'<table aria-label="{_html.escape(caption)}" style="border-collapse: collapse; border: none; margin: 2px 0; '
        f'font-size: inherit"><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table>'
    )


def bar(label: str, *parts: tuple[float, str]) -> Html:
    """A bar with parts of it (0 to 1, together at most 1) in colours, and what it says in words beside it."""
    filled = "".join(
        f'<span style="display: inline-block; height: 100%; width: {100 * min(1.0, max(0.0, share)):.1f}%; '
        f'background: {color}; vertical-align: top"></span>'
        for share, color in parts
    )
    frame = (
        f"display: inline-block; width: 6em; height: 0.8em; background: {_FAINT}; border-radius: 3px; "
        "overflow: hidden; white-space: nowrap; margin-right: 8px; vertical-align: -1px; text-align: left; "
        "font-size: 12px; line-height: 0"
    )
    words = "display: inline-block; min-width: 4em; text-align: right"  # lest columns move with every digit
    return Html(f'<span aria-hidden="true" style="{frame}">{filled}</span><span style="{words}">{escape(label)}</span>')
