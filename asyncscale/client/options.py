"""What a client is made with, checked: options of the engines, the routing policy, the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.checkpoint.progress import Progress
from asyncscale.checkpoint.resolve import resolve_model
from asyncscale.client.policies import POLICIES, Policy
from asyncscale.config import CheckpointFiles, EngineConfig, SimulatedModel
from asyncscale.params import SamplingParams
from asyncscale.suggestions import closest, did_you_mean

# How vLLM, SGLang, transformers and llama.cpp call the same.
_SYNONYMS = {
    "data_parallel_size": "num_engines",
    "dp_size": "num_engines",
    "num_workers": "num_engines",
    "gpu_memory_utilization": "kv_cache_memory_fraction",
    "mem_fraction_static": "kv_cache_memory_fraction",
    "torch_dtype": "dtype",
    "context_length": "max_model_len",
    "n_ctx": "max_model_len",
    "max_running_requests": "max_num_seqs",
    "n_threads": "threads_per_engine",
    "num_threads": "threads_per_engine",
}


@dataclass(frozen=True)
class Limits:
    """What requests of one client wait for, and how many: see AsyncScaleClient."""

    restart_timeout: float = 60.0
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_queued_requests", "max_queued_tokens"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value, 0, "None")
        check_seconds("restart_timeout", self.restart_timeout)


def check_model(model: object) -> None:
    """Raises TypeError, and ValueError for an address."""
    if not isinstance(model, str | os.PathLike | SimulatedModel):
        got = "the class itself" if model is SimulatedModel else type(model).__name__
        raise TypeError(f"model must be a name, a path or a SimulatedModel, got {got}")
    if isinstance(model, str) and model.startswith(("ipc://", "tcp://")):
        raise ValueError("that is the address of another client: use AsyncScaleClient.attach(address)")


def check_count(name: str, value: object, low: int, otherwise: str = "") -> None:
    """Raises ValueError. otherwise: what may be there in place of a number, and was looked for."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        alternative = f"{otherwise} or " if otherwise else ""
        raise ValueError(f"{name} must be {alternative}an integer of at least {low}, got {value!r}")


def check_seconds(name: str, value: object, otherwise: str = "") -> None:
    """Like `check_count`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
        alternative = f"{otherwise} or " if otherwise else ""
        raise ValueError(f"{name} must be {alternative}a number of seconds of at least 0, got {value!r}")


def find_model(model: str | os.PathLike[str], progress: Progress) -> tuple[CheckpointFiles, ModelConfig]:
    """The model's files, fetched if need be, and its architecture. Blocks.

    Raises ModelLoadError, also for an architecture that is not supported: before any engine starts.
    """
    files = resolve_model(model, progress)
    return files, ModelConfig.load(files)


def engine_config(options: Mapping[str, Any], client_options: Iterable[str]) -> EngineConfig:
    """client_options: what a client takes besides.

    Raises TypeError for an unknown option, with the closest known one, and ValueError for a wrong value.
    """
    if unknown := options.keys() - set(EngineConfig.__struct_fields__):
        name, known = min(unknown), [*client_options, *EngineConfig.__struct_fields__]
        of_requests = name in SamplingParams.__struct_fields__
        cure = ": pass it to generate, for each request" if of_requests else did_you_mean(name, known, _SYNONYMS)
        raise TypeError(f"AsyncScaleClient has no option {name!r}{cure}")
    for name, annotation in get_type_hints(EngineConfig).items():
        if name in options:
            _check_type(name, options[name], annotation)
    try:
        return msgspec.convert(options, EngineConfig)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


_KINDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string", type(None): "None"}


def _check_type(name: str, value: object, annotation: Any) -> None:
    try:
        msgspec.convert(value, annotation)
    except msgspec.ValidationError:
        raise ValueError(f"{name} must be {' or '.join(_kinds(annotation))}, got {value!r}") from None


def _kinds(annotation: Any) -> list[str]:
    """A type in words."""
    if get_origin(annotation) is Literal:
        return [repr(value) for value in get_args(annotation)]
    if alternatives := get_args(annotation):
        return [kind for alternative in alternatives for kind in _kinds(alternative)]
    return [_KINDS[annotation]]


def routing_policy(routing: str | Policy) -> Policy:
    """A policy by its name, or a function as it is. Raises ValueError."""
    if callable(routing):
        return routing
    if routing not in POLICIES:
        close = closest(routing, POLICIES) if isinstance(routing, str) else None
        hint = f"; did you mean {close!r}?" if close else ""
        raise ValueError(f"routing must be one of {', '.join(POLICIES)} or a function, got {routing!r}{hint}")
    return POLICIES[routing]
