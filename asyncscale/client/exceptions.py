"""Exceptions that are kept, raised again, or made anew elsewhere."""

from __future__ import annotations

from types import FunctionType
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


def fresh(error: E) -> E:
    """A copy of an error that is kept, to raise it.

    A traceback holds every frame that it passed, and frames hold tokens, which the garbage collector does not look
    into, and these their stream: a stream that kept an error with a traceback would stay for ever.
    """
    copy = rebuild(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    copy.__cause__, copy.__suppress_context__ = error.__cause__, error.__suppress_context__
    return copy


def rebuild(kind: type[E], *args: object) -> E:
    """An exception with these `args`, without its `__init__`, which need not take the `args` that it leaves behind."""
    error = kind.__new__(kind, *args)
    inits = (vars(base).get("__init__") for base in kind.__mro__)
    builtin_init = next(init for init in inits if init is not None and not isinstance(init, FunctionType))
    builtin_init(error, *args)
    return error
