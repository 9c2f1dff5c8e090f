"""Methods with the arguments of others, for type checkers, editors and `help`, without copying them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

Method = Callable[Concatenate[S, ...], R]


def arguments_of(function: Callable[P, object]) -> Callable[[Method[S, R]], Callable[Concatenate[S, P], R]]:
    """Decorates a method that passes its arguments on to `function`: a class, or a method that is bound."""
    return lambda method: _signed(method, list(inspect.signature(function).parameters.values()))


def arguments_of_method(
    function: Callable[Concatenate[Any, P], object],
) -> Callable[[Method[S, R]], Callable[Concatenate[S, P], R]]:
    """Decorates a method that passes its arguments on to `function`, a method as its class has it."""
    return lambda method: _signed(method, list(inspect.signature(function).parameters.values())[1:])


def _signed(method: Callable[..., R], arguments: list[inspect.Parameter]) -> Callable[..., R]:
    own = inspect.signature(method)
    own_self = next(iter(own.parameters.values())).replace(kind=inspect.Parameter.POSITIONAL_ONLY)
    if not any(argument.kind is inspect.Parameter.POSITIONAL_ONLY for argument in arguments):
        own_self = own_self.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = own.replace(parameters=[own_self, *arguments])  # type: ignore[attr-defined]
    return method
