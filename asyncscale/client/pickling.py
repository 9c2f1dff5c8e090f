"""The one door to cloudpickle: functions to front ends, and their results and exceptions back.

Unpickling runs whatever code the sender chose. So only what comes over the private pipe between a process and a child
that it started itself may be loaded here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, cast

import cloudpickle

from asyncscale.client.exceptions import rebuild

_by_value = threading.Lock()  # what cloudpickle sends by value is a setting of the whole process


def dumps(value: object) -> bytes:
    """Pickle. Raises whatever the value's own parts raise, most often TypeError or PicklingError."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def dumps_function(function: Callable[..., Any]) -> bytes:
    """Pickle a function, with all that it refers to in its own module, should that not be there to import elsewhere."""
    with _by_value, _module_by_value(_module_of(function)):
        return dumps(function)


def loads(data: bytes) -> Any:
    """Unpickle what a process of our own pickled. Raises whatever the value's own parts raise."""
    return _Unpickler(io.BytesIO(data)).load()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Takes exceptions to bits without their `__init__`, which need not take the `args` that it leaves behind.

    And code keeps the name of its file, which newer cloudpickles take away: tracebacks of front ends show its lines.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, CodeType):
            make, args = self.dispatch_table[CodeType](value)
            return _code_of_file, (value.co_filename, make, args)
        if isinstance(value, BaseException):
            kind = type(value)
            is_reduced_as_ever = not isinstance(kind.__reduce__, FunctionType)
            if is_reduced_as_ever and isinstance(kind.__init__, FunctionType):
                _, args, *state = cast("tuple[Any, ...]", value.__reduce__())
                return rebuild, (kind, *args), *state
        return super().reducer_override(value)


def _code_of_file(filename: str, make: Callable[..., CodeType], args: tuple[Any, ...]) -> CodeType:
    return make(*args).replace(co_filename=filename)


class _Unpickler(pickle.Unpickler):
    """Leaves the user's classes alone: cloudpickle gives one that returns home all attributes anew, as they were away.

    Its methods would then no more see what changes in their module.
    """

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return functools.partial(_complete_class, found) if name == "_class_setstate" else found


def _complete_class(set_state: Callable[..., type], kind: type, state: tuple[dict[str, Any], Any]) -> type:
    attributes, slots = state
    always = ("__doc__", "_abc_impl")  # there, though empty, in a class that is just being made
    missing = {name: value for name, value in attributes.items() if name in always or name not in vars(kind)}
    return set_state(kind, (missing, slots))


def _module_of(function: Callable[..., Any]) -> ModuleType | None:
    while isinstance(function, functools.partial):
        function = function.func
    return sys.modules.get(getattr(function, "__module__", None) or "")


@contextlib.contextmanager
def _module_by_value(module: ModuleType | None) -> Iterator[None]:
    """For a module that was loaded from some file in a way of its own, as pytest loads tests."""
    if module is None or module.__name__ in cloudpickle.list_registry_pickle_by_value() or _is_importable(module):
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _is_importable(module: ModuleType) -> bool:
    """Whether another process with our sys.path finds a module of this name."""
    path, name, origin = None, "", None
    for part in module.__name__.split("."):
        name = f"{name}.{part}" if name else part
        specs = (finder.find_spec(name, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            return False
        path, origin = spec.submodule_search_locations, spec.origin
    return module.__spec__ is not None and module.__spec__.origin == origin
