"""asyncscale: a language model on every core you have, as one asyncio client.

::

    async with AsyncScaleClient("smollm2-135m-instruct", num_engines=2) as client:
        async for token in client.generate("The capital of France is", max_tokens=32):
            print(token, end="", flush=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncscale.client.client import AsyncScaleClient as AsyncScaleClient
    from asyncscale.client.completion import ChoiceCompletion as ChoiceCompletion
    from asyncscale.client.completion import Completion as Completion
    from asyncscale.client.completion import Logprob as Logprob
    from asyncscale.client.completion import Timing as Timing
    from asyncscale.client.frontends import run_frontends as run_frontends
    from asyncscale.client.generation import Generation as Generation
    from asyncscale.client.generation import Token as Token
    from asyncscale.client.policies import EngineLoad as EngineLoad
    from asyncscale.client.policies import RoutingRequest as RoutingRequest
    from asyncscale.client.roster import EngineHealth as EngineHealth
    from asyncscale.config import SimulatedModel as SimulatedModel
    from asyncscale.errors import AsyncScaleError as AsyncScaleError
    from asyncscale.errors import ClientClosedError as ClientClosedError
    from asyncscale.errors import ClientStateError as ClientStateError
    from asyncscale.errors import EngineDeadError as EngineDeadError
    from asyncscale.errors import EngineError as EngineError
    from asyncscale.errors import EngineStartError as EngineStartError
    from asyncscale.errors import FrontendError as FrontendError
    from asyncscale.errors import InvalidRequestError as InvalidRequestError
    from asyncscale.errors import ModelLoadError as ModelLoadError
    from asyncscale.errors import OverloadedError as OverloadedError
    from asyncscale.errors import RequestAbortedError as RequestAbortedError
    from asyncscale.errors import RequestTimeoutError as RequestTimeoutError
    from asyncscale.params import SamplingParams as SamplingParams

__version__ = "0.1.0"

# Imported when first used: engine processes need nothing of the client, and `import asyncscale` costs milliseconds.
_HOMES = {
    "asyncscale.client.client": ("AsyncScaleClient",),
    "asyncscale.client.completion": ("ChoiceCompletion", "Completion", "Logprob", "Timing"),
    "asyncscale.client.frontends": ("run_frontends",),
    "asyncscale.client.generation": ("Generation", "Token"),
    "asyncscale.client.policies": ("EngineLoad", "RoutingRequest"),
    "asyncscale.client.roster": ("EngineHealth",),
    "asyncscale.config": ("SimulatedModel",),
    "asyncscale.errors": (
        "AsyncScaleError",
        "ClientClosedError",
        "ClientStateError",
        "EngineDeadError",
        "EngineError",
        "EngineStartError",
        "FrontendError",
        "InvalidRequestError",
        "ModelLoadError",
        "OverloadedError",
        "RequestAbortedError",
        "RequestTimeoutError",
    ),
    "asyncscale.params": ("SamplingParams",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
