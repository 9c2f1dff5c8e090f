"""Signatures as text, with annotations as they were written."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

_WIDTH = 100


def signature_of(function: Callable[..., Any], name: str) -> str:
    """Of a class or function; `name` is what to call it. Long ones have a line for each parameter."""
    signature = inspect.signature(function)
    own = getattr(function, "__annotations__", {}) if inspect.isclass(function) else {}
    parameters = [
        parameter.replace(annotation=_Verbatim(_annotation(own.get(parameter.name, parameter.annotation))))
        for parameter in signature.parameters.values()
        if parameter.name != "self" and not parameter.name.startswith("_")
    ]
    returns = signature.return_annotation
    end = "" if inspect.isclass(function) or returns is signature.empty else f" -> {_annotation(returns)}"
    name = _kind(function) + name
    text = f"{name}{signature.replace(parameters=parameters, return_annotation=signature.empty)}{end}"
    if len(text) > _WIDTH:
        lines = _markers(parameters)
        text = f"{name}(\n" + textwrap.indent(",\n".join(lines), "    ") + f",\n){end}"
    return text


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


def property_of(member: property, name: str) -> str:
    assert member.fget is not None
    return f"{name}: {_annotation(inspect.signature(member.fget).return_annotation)}"


def _kind(function: Callable[..., Any]) -> str:
    if inspect.isclass(function):
        return "class "
    if inspect.iscoroutinefunction(function):
        return "async "
    return "classmethod " if inspect.isclass(getattr(function, "__self__", None)) else ""
