"""Writes the API reference out of signatures and docstrings::

    PYTHONPATH=. python tests/docs/api_reference.py

Signatures are fenced as ``py`` and docstrings' examples as ``python``: the latter are run by the tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
from api_docstrings import markdown_of
from api_signatures import property_of, signature_of

from asyncscale import AsyncScaleError, errors

PAGE = Path(__file__).parents[2] / "asyncscale" / "docs" / "api.md"

# Public modules, and what is documented there besides their __all__.
MODULES: dict[str, tuple[str, ...]] = {
    "asyncscale": ("asyncscale.config.EngineConfig", "asyncscale.notebook.dashboard.Dashboard"),
    "asyncscale.blocking": (),
    "asyncscale.metrics": (),
    "asyncscale.testing": (),
}


def render() -> str:
    """The whole page."""
    parts = ["# API reference", "Made of the docstrings by `tests/docs/api_reference.py`: change those, not this page."]
    sections = [(module, _public(module, further)) for module, further in MODULES.items()]
    for module, documented in sections:
        parts.append(f"- [{module}](#{_slug(module)}): " + ", ".join(_link(_title(module, one)) for one in documented))
    for module, documented in sections:
        parts += [f"## {module}", markdown_of(import_module(module))]
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
        yield _fenced(signature_of(documented, documented.__name__))
        yield markdown_of(documented)
        return
    bases = [base.__name__ for base in documented.__bases__ if base not in (object, msgspec.Struct, tuple)]
    if not bases or "__init__" in vars(documented):
        yield _fenced(signature_of(documented, documented.__name__))
    if bases:
        yield f"Base: {', '.join(f'`{base}`' for base in bases)}."
    yield markdown_of(documented)
    members = {name: member for name, member in vars(documented).items() if not name.startswith("_")}
    plain = [f"`{property_of(member, name)}`" for name, member in members.items() if _is_plain(member)]
    if plain:
        yield f"Properties: {', '.join(plain)}."
    for name, member in members.items():
        if _is_code(member) and not _is_plain(member):
            yield f"#### {title}.{name}"
            is_property = isinstance(member, property)
            yield _fenced(property_of(member, name) if is_property else signature_of(getattr(documented, name), name))
            yield markdown_of(getattr(documented, name))


def _render_errors() -> Iterator[str]:
    before, tree = (errors.__doc__ or "").split("::\n\n")
    yield "### Errors"
    yield f"{before}:\n\n```text\n{tree.strip()}\n```"


def _fenced(signature: str) -> str:
    return f"```py\n{signature}\n```"


def _is_code(member: object) -> bool:
    return inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)


def _is_plain(member: object) -> bool:
    """A property that its class tells of."""
    return isinstance(member, property) and not member.__doc__


def _is_error(documented: object) -> bool:
    return inspect.isclass(documented) and issubclass(documented, Exception)


def _link(title: str) -> str:
    return f"[`{title}`](#{_slug(title)})"


def _slug(heading: str) -> str:
    return heading.lower().replace(".", "")


if __name__ == "__main__":
    PAGE.write_text(render())
