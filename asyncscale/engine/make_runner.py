"""The runner that an engine's spec asks for, and the group that it steps with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from asyncscale.config import EngineSpec, SimulatedModel
from asyncscale.engine.runner import Runner
from asyncscale.progress import Progress
from asyncscale.tandem.core import TandemRunner

if TYPE_CHECKING:
    from asyncscale.tandem.core import Collectives

Report = Callable[[str, float], None]


class AnyRunner(Runner, TandemRunner, Protocol):
    """Of an engine, in tandem or not."""


def make_runner(spec: EngineSpec, progress: Progress, report: Report) -> tuple[AnyRunner, Collectives | None]:
    """Loads the model. The group: None for engines that step on their own.

    progress: where to show that the engine waits for others of its group. report: is called with a stage of loading and
    its fraction done. Everything is imported here: a simulated engine loads nothing that computes.
    """
    if isinstance(spec.model, SimulatedModel):
        return _simulated(spec, spec.model, progress)
    report("import", 0.0)
    from asyncscale.model.runner import ModelRunner

    if not spec.in_tandem:
        return ModelRunner(spec, report), None
    from asyncscale.model.torch_devices import engine_device
    from asyncscale.tandem.torch_group import TorchGroup

    group = TorchGroup(spec.folder, spec.engine_id, spec.num_engines, progress, engine_device(spec.engine_id))
    return ModelRunner(spec, report, group), group


def _simulated(spec: EngineSpec, model: SimulatedModel, progress: Progress) -> tuple[AnyRunner, Collectives | None]:
    if not spec.in_tandem:
        from asyncscale.model.simulation import SimulatedRunner

        return SimulatedRunner(model, spec.config), None
    from asyncscale.tandem.lockstep import LockstepGroup, LockstepRunner

    group = LockstepGroup(spec.folder, spec.engine_id, spec.num_engines, progress)
    return LockstepRunner(model, spec.config, group), group
