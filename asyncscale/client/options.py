"""What a client is made with, checked: options of the engines, the routing policy, the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.checkpoint.progress import Progress
from asyncscale.checkpoint.resolve import resolve_model
from asyncscale.client.policies import POLICIES, Policy
from asyncscale.config import CheckpointFiles, EngineConfig
from asyncscale.params import SamplingParams
from asyncscale.suggestions import did_you_mean

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
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"{name} must be an integer of at least 0, or None, got {value!r}")
        if not isinstance(self.restart_timeout, int | float) or not self.restart_timeout >= 0:
            raise ValueError(f"restart_timeout must be a number of seconds of at least 0, got {self.restart_timeout!r}")


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
    try:
        return msgspec.convert(options, EngineConfig)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def routing_policy(routing: str | Policy) -> Policy:
    """A policy by its name, or a function as it is. Raises ValueError."""
    if callable(routing):
        return routing
    if routing not in POLICIES:
        raise ValueError(f"routing must be one of {', '.join(POLICIES)} or a function, got {routing!r}")
    return POLICIES[routing]
