"""Docstrings as Markdown: literal blocks are fenced, and each name that is explained has a line."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import textwrap

_LITERAL = re.compile(r"(?P<before>[^\n]*)::\n\n(?P<block>(?:(?: {4}[^\n]*)?\n)+)")


def markdown_of(documented: object) -> str:
    """The docstring of a module, class, function or property."""
    text = inspect.cleandoc(documented.__doc__ or "") + "\n"
    if names := _names(documented):
        name = rf"\*{{0,2}}(?:{'|'.join(sorted(names, key=len, reverse=True))})"
        # A line of its own for each name that is explained: markdown would let them flow into each other.
        named = re.compile(rf"(?:^|(?<=[.;)]) )({name}(?:, {name})*): ", re.MULTILINE)
        text = named.sub(_list_item, text)
    return _LITERAL.sub(_fence, re.sub(r"(?<!\n)\nRaises", "\n\nRaises", text)).strip()


def _names(documented: object) -> set[str]:
    """What a docstring may explain: parameters, fields, properties."""
    names = set(vars(documented)) if inspect.isclass(documented) else set()
    with contextlib.suppress(TypeError, ValueError):  # neither callable, nor with more arguments than any error
        names.update(inspect.signature(documented).parameters)  # type: ignore[arg-type]
    return names


def _list_item(named: re.Match[str]) -> str:
    start = "" if named.start() == 0 or named.string[named.start() - 1] == "\n" else "\n"
    return f"{start}- {', '.join(f'`{name}`' for name in named[1].split(', '))}: "


def _fence(literal: re.Match[str]) -> str:
    block = textwrap.dedent(literal["block"]).strip("\n")
    before = f"{literal['before']}:\n\n" if literal["before"] else ""
    return f"{before}```{'python' if _is_python(block) else 'text'}\n{block}\n```\n\n"


def _is_python(text: str) -> bool:
    try:
        compile(text, "docstring", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except SyntaxError:
        return False
    return True
