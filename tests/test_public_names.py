"""What `asyncscale` exports is a promise: a name is added or removed on purpose, here too."""

from __future__ import annotations

import inspect

import asyncscale

PUBLIC_NAMES = [
    "AsyncScaleClient",
    "AsyncScaleError",
    "ChoiceCompletion",
    "ClientClosedError",
    "ClientStateError",
    "Completion",
    "EngineDeadError",
    "EngineError",
    "EngineHealth",
    "EngineLoad",
    "EngineStartError",
    "FrontendError",
    "Generation",
    "InvalidRequestError",
    "Logprob",
    "ModelLoadError",
    "OverloadedError",
    "RequestAbortedError",
    "RequestTimeoutError",
    "RoutingRequest",
    "SamplingParams",
    "SimulatedModel",
    "Timing",
    "Token",
    "run_frontends",
]


def test_the_public_names_are_these() -> None:
    assert asyncscale.__all__ == PUBLIC_NAMES
    assert set(PUBLIC_NAMES) <= set(dir(asyncscale))


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    for name in PUBLIC_NAMES:
        value = getattr(asyncscale, name)
        assert value.__doc__, name
        if not inspect.isclass(value):
            continue
        assert value.__doc__ != value.__mro__[1].__doc__, name
        for member, function in inspect.getmembers(value, inspect.isfunction):
            if not member.startswith("_") and function.__module__.startswith("asyncscale."):
                assert function.__doc__, f"{name}.{member}"


def test_errors_are_one_tree() -> None:
    errors = [getattr(asyncscale, name) for name in PUBLIC_NAMES if name.endswith("Error")]
    assert all(issubclass(error, asyncscale.AsyncScaleError) for error in errors)
    assert issubclass(asyncscale.InvalidRequestError, ValueError)
    assert issubclass(asyncscale.RequestTimeoutError, TimeoutError)
    assert issubclass(asyncscale.EngineStartError, asyncscale.EngineError)
    assert issubclass(asyncscale.EngineDeadError, asyncscale.EngineError)


def test_engine_errors_carry_what_is_known_of_the_process() -> None:
    error = asyncscale.EngineDeadError("engine 3 died", engine_id=3, exit_code=-9, stderr_tail="last words")
    assert (error.engine_id, error.exit_code, error.stderr_tail) == (3, -9, "last words")
    assert "last words" in str(error)
