"""An engine that has no native kernels, as where there was no C++ compiler."""

from __future__ import annotations

from multiprocessing.connection import Connection

from asyncscale.config import EngineSpec


def run_engine_without_kernels(spec: EngineSpec, lifeline: Connection) -> None:
    """In place of `asyncscale.engine.process.run_engine`."""
    from asyncscale.engine.process import run_engine
    from asyncscale.model import decoder

    decoder.load_library = lambda isa=None: None
    run_engine(spec, lifeline)
