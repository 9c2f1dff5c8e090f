"""asyncscale: a language model on every core you have, as one asyncio client.

::

    async with AsyncScaleClient("smollm2-135m-instruct", num_engines=2) as client:
        async for token in client.generate("The capital of France is", max_tokens=32):
            print(token, end="", flush=True)
"""

from asyncscale.client import (
    AsyncScaleClient,
    ChoiceCompletion,
    Completion,
    EngineLoad,
    Generation,
    Logprob,
    RoutingRequest,
    Timing,
    Token,
)
from asyncscale.config import SimulatedModel
from asyncscale.errors import (
    AsyncScaleError,
    ClientClosedError,
    ClientStateError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    ModelLoadError,
    OverloadedError,
    RequestAbortedError,
    RequestTimeoutError,
)
from asyncscale.params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AsyncScaleClient",
    "AsyncScaleError",
    "ChoiceCompletion",
    "ClientClosedError",
    "ClientStateError",
    "Completion",
    "EngineDeadError",
    "EngineError",
    "EngineLoad",
    "EngineStartError",
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
]
