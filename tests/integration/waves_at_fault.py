"""An engine process whose waves are at fault, to be started in place of a sound one."""

from __future__ import annotations

from multiprocessing.connection import Connection

from asyncscale.config import EngineSpec
from asyncscale.engine.process import run_engine
from asyncscale.tandem.engine import EngineWaves


def run_out_of_step(spec: EngineSpec, lifeline: Connection) -> None:
    """Engine 1 never compares notes with the others: it is in the next step when they do."""
    if spec.engine_id == 1:
        EngineWaves.step_done = lambda waves: False  # type: ignore[method-assign]
    run_engine(spec, lifeline)
