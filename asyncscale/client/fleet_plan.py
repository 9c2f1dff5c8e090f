"""Which engines an owner is to start: the model found, their number decided, each given its cores."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Literal

from asyncscale import transport
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.client.options import check_count, check_model, check_seconds, find_model
from asyncscale.client.placement import place_engines
from asyncscale.client.progress import StartProgress
from asyncscale.client.sizing import auto_num_engines
from asyncscale.client.supervisor import Launch
from asyncscale.config import EngineConfig, ModelSource, SimulatedModel
from asyncscale.cpus import usable_cpus
from asyncscale.errors import ModelLoadError
from asyncscale.memory import available_memory


@dataclass(frozen=True)
class FleetPlan:
    """What its user asked for; see AsyncScaleClient. Raises TypeError and ValueError for what cannot be."""

    model: str | os.PathLike[str] | SimulatedModel
    num_engines: int | Literal["auto"]
    config: EngineConfig
    start_timeout: float
    max_restarts: int
    hang_timeout: float | None
    host: str | None

    def __post_init__(self) -> None:
        check_model(self.model)
        if isinstance(self.model, SimulatedModel) and self.config.enable_expert_parallel:
            raise ValueError(
                "enable_expert_parallel deals out a checkpoint's experts, and a SimulatedModel has none: "
                "for simulated engines that step together, use SimulatedModel(lockstep=True)"
            )
        if self.num_engines != "auto":
            check_count("num_engines", self.num_engines, 1, '"auto"')
        check_seconds("start_timeout", self.start_timeout)
        check_count("max_restarts", self.max_restarts, 0)
        if self.hang_timeout is not None:
            check_seconds("hang_timeout", self.hang_timeout, "None")
        if self.host is not None and not isinstance(self.host, str):
            raise TypeError(f"host must be a string or None, got {type(self.host).__name__}")

    async def launch(self, progress: StartProgress) -> Launch:
        """What that means on this machine, now. The model is fetched, if need be. Raises ModelLoadError."""
        source: ModelSource
        architecture: ModelConfig | None = None
        if isinstance(self.model, SimulatedModel):
            source = self.model
        else:
            source, architecture = await asyncio.to_thread(find_model, self.model, progress.on_fetch)
        cpus, config, num_engines = usable_cpus(), self.config, self.num_engines
        if config.enable_expert_parallel and architecture is not None:
            _check_has_experts(architecture)
        if num_engines == "auto":
            num_engines = auto_num_engines(cpus.num_cores, config, architecture, available_memory())
        progress.num_engines = num_engines
        return Launch(
            source,
            config,
            place_engines(cpus, num_engines, config.threads_per_engine, config.pin_engines),
            self.start_timeout,
            progress.on_loading,
            self.max_restarts,
            self.hang_timeout,
            None if self.host is None else await asyncio.to_thread(transport.tcp_binding, self.host),
        )


def _check_has_experts(model: ModelConfig) -> None:
    if model.experts is None:
        raise ModelLoadError(
            f"enable_expert_parallel would deal out the model's experts, but this {model.architecture} has none: "
            "leave it off, and each engine computes requests of its own"
        )
