"""Writes the API reference out of signatures and docstrings::

    PYTHONPATH=. python tests/docs/api_reference.py

Signatures are fenced as ``py`` and docstrings' examples as ``python``: the latter are run by the tests.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from asyncscale import AsyncScaleError, errors

PAGE = Path(__file__).parents[2] / "asyncscale" / "docs" / "api.md"

# Public modules, and what is documented there besides their __all__.
MODULES: dict[str, tuple[str, ...]] = {
    "asyncscale": ("asyncscale.config.EngineConfig",),
    "asyncscale.blocking": (),
    "asyncscale.metrics": (),
    "asyncscale.testing": (),
}

_WIDTH = 100
_LITERAL = re.compile(r"(?P<before>[^\n]*)::\n\n(?P<block>(?:(?: {4}[^\n]*)?\n)+)")


def render() -> str:
    """The whole page."""
    parts = ["# API reference", "Made of the docstrings by `tests/docs/api_reference.py`: change those, not this page."]
    sections = [(module, _public(module, further)) for module, further in MODULES.items()]
    for module, documented in sections:
        parts.append(f"- [{module}](#{_slug(module)}): " + ", ".join(_link(_title(module, one)) for one in documented))
    for module, documented in sections:
        parts += [f"## {module}", _docstring(import_module(module))]
        for one in documented:
            parts += _render_object(one, _title(module, one))
    return "\n\n".join(filter(None, parts)) + "\n"


def _public(module: str, further: tuple[str, ...]) -> list[Any]:
    """In alphabetical order, errors last."""
    home = import_module(module)
    documented = [getattr(home, name) for name in home.__all__]
    for name in further:
        where, _, what = name.rpartition(".")
        documented.append(getattr(import_module(where), what))
    return sorted(documented, key=lambda one: (_is_error(one), one.__name__))


def _title(module: str, documented: Any) -> str:
    """Its name, with that of the module below asyncscale, so that all are different."""
    return f"{module}.{documented.__name__}".removeprefix("asyncscale.")


def _render_object(documented: Any, title: str) -> Iterator[str]:
    if documented is AsyncScaleError:
        yield from _render_errors()
    yield f"### {title}"
    if not inspect.isclass(documented):
        yield _signature(documented, _kind(documented) + documented.__name__)
        yield _docstring(documented)
        return
    bases = [base.__name__ for base in documented.__bases__ if base not in (object, msgspec.Struct, tuple)]
    if not bases or "__init__" in vars(documented):
        yield _signature(documented, f"class {documented.__name__}")
    if bases:
        yield f"Base: {', '.join(f'`{base}`' for base in bases)}."
    yield _docstring(documented)
    members = {name: member for name, member in vars(documented).items() if not name.startswith("_")}
    plain = [f"`{_typed(name, member)}`" for name, member in members.items() if _is_plain(member)]
    if plain:
        yield f"Properties: {', '.join(plain)}."
    for name, member in members.items():
        if _is_code(member) and not _is_plain(member):
            yield f"#### {title}.{name}"
            if isinstance(member, property):
                yield f"```py\n{_typed(name, member)}\n```"
            else:
                yield _signature(getattr(documented, name), _kind(member) + name)
            yield _docstring(getattr(documented, name))


def _render_errors() -> Iterator[str]:
    before, tree = (errors.__doc__ or "").split("::\n\n")
    yield "### Errors"
    yield f"{before}:\n\n```text\n{tree.strip()}\n```"


def _signature(function: Callable[..., Any], name: str) -> str:
    signature = inspect.signature(function)
    own = getattr(function, "__annotations__", {}) if inspect.isclass(function) else {}
    parameters = [
        parameter.replace(annotation=_Verbatim(_annotation(own.get(parameter.name, parameter.annotation))))
        for parameter in signature.parameters.values()
        if parameter.name != "self" and not parameter.name.startswith("_")
    ]
    returns = signature.return_annotation
    end = "" if inspect.isclass(function) or returns is signature.empty else f" -> {_annotation(returns)}"
    text = f"{name}{signature.replace(parameters=parameters, return_annotation=signature.empty)}{end}"
    if len(text) > _WIDTH:
        lines = _markers(parameters)
        text = f"{name}(\n" + textwrap.indent(",\n".join(lines), "    ") + f",\n){end}"
    return f"```py\n{text}\n```"


def _markers(parameters: list[inspect.Parameter]) -> list[str]:
    """The parameters, with `/` and `*` between them where they belong."""
    lines: list[str] = []
    kinds = [parameter.kind for parameter in parameters]
    for number, parameter in enumerate(parameters):
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.VAR_POSITIONAL not in kinds and "*" not in lines:
            lines.append("*")
        lines.append(str(parameter))
        is_last = parameter.kind is parameter.POSITIONAL_ONLY and parameter.kind not in kinds[number + 1 :]
        lines += ["/"] if is_last else []
    return lines


class _Verbatim:
    """Shown by inspect as the text that it is."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _annotation(annotation: object) -> str:
    return (
        getattr(annotation, "__forward_arg__", annotation) if not inspect.isclass(annotation) else annotation.__name__
    )


def _typed(name: str, member: property) -> str:
    assert member.fget is not None
    return f"{name}: {_annotation(inspect.signature(member.fget).return_annotation)}"


def _kind(member: object) -> str:
    if inspect.iscoroutinefunction(member):
        return "async "
    return "classmethod " if isinstance(member, classmethod) else ""


def _is_code(member: object) -> bool:
    return inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)


def _is_plain(member: object) -> bool:
    """A property that its class tells of."""
    return isinstance(member, property) and not member.__doc__


def _docstring(documented: object) -> str:
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


def _is_error(documented: object) -> bool:
    return inspect.isclass(documented) and issubclass(documented, Exception)


def _link(title: str) -> str:
    return f"[`{title}`](#{_slug(title)})"


def _slug(heading: str) -> str:
    return heading.lower().replace(".", "")


if __name__ == "__main__":
    PAGE.write_text(render())
