"""The client: engines supervised, requests routed, tokens streamed."""

from asyncscale.client.client import AsyncScaleClient
from asyncscale.client.completion import ChoiceCompletion, Completion, Logprob, Timing
from asyncscale.client.generation import Generation, Token
from asyncscale.client.router import EngineLoad, RoutingRequest

__all__ = [
    "AsyncScaleClient",
    "ChoiceCompletion",
    "Completion",
    "EngineLoad",
    "Generation",
    "Logprob",
    "RoutingRequest",
    "Timing",
    "Token",
]
