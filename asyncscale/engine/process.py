"""The engine process: `run_engine` is its entry point.

A second thread only waits for the owner's end of the lifeline to close, and then ends the process: also while the model
loads, and in the middle of a step. It sleeps in `recv` and never competes for the interpreter. What the process logs
goes over the lifeline, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from asyncscale import messages, transport
from asyncscale.config import EngineSpec, SimulatedModel
from asyncscale.engine.log_relay import ROOT, LogRelay
from asyncscale.errors import ModelLoadError
from asyncscale.progress import Progress

if TYPE_CHECKING:
    from asyncscale.engine.runner import Runner

logger = logging.getLogger(__name__)


def run_engine(spec: EngineSpec, lifeline: Connection) -> None:
    """Load the model of `spec`, tell the supervisor on `lifeline`, then serve until the lifeline closes."""
    if spec.cpus and hasattr(os, "sched_setaffinity"):  # macOS has no such thing
        with contextlib.suppress(OSError):  # they were taken from us since they were chosen
            os.sched_setaffinity(0, spec.cpus)  # before there is any other thread: those inherit it
    relay = LogRelay(lifeline)
    relay.set_levels(spec.log_levels)
    logging.getLogger(ROOT).addHandler(relay)
    watch = threading.Thread(target=_follow_owner, args=(lifeline, spec.folder, relay), name="lifeline", daemon=True)
    watch.start()
    _ignore_group_signals()
    while not os.path.exists(spec.progress_path):  # the owner makes it when there are engines to remove the folder
        time.sleep(0.001)
    _take_over_stdio(spec.stderr_path)
    faulthandler.enable(2)  # a crash in native code leaves a traceback there; sys.stderr may be None
    # numpy's BLAS is not used here, but would start its threads when numpy is imported: half of the import's CPU time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    def tell(message: messages.FromEngineProcess) -> None:
        lifeline.send_bytes(messages.encoder.encode(message))

    try:
        # Imported here, after the line above; and whoever starts engines imports this module, but needs none of that.
        from asyncscale.engine.core import EngineCore
        from asyncscale.engine.server import EngineServer
        from asyncscale.metrics.engine_counters import EngineCounters

        started = time.monotonic()
        runner = _make_runner(spec, lambda phase, fraction: tell(messages.Loading(phase, fraction)))
        facts = messages.EngineFacts(
            vocab_size=runner.vocab_size,
            max_model_len=runner.max_model_len,
            max_num_seqs=spec.config.max_num_seqs,
            block_size=spec.config.block_size,
            num_blocks=runner.num_blocks,
            dtype=runner.dtype,
            load_s=time.monotonic() - started,
            pid=os.getpid(),
            weight_version=spec.weight_version,
        )
        context = transport.make_context()
        socket = transport.bind_router(
            context,
            spec.address,
            tcp=spec.tcp,
            max_bytes=messages.MAX_REQUEST_BYTES + 4 * runner.max_model_len,
            heartbeat=True,
        )
        progress = Progress(spec.progress_path)
        runner.progress = progress
        counters = EngineCounters(spec.counters_path)
        core = EngineCore(runner, spec.config, counters=counters, weight_version=spec.weight_version)
        server = EngineServer(core, socket, spec.num_engines, progress, counters)
    except BaseException as error:
        text = traceback.format_exc()
        tell(messages.Failed(text, str(error) if isinstance(error, ModelLoadError) else None))
        sys.exit(1)
    gc.collect()
    gc.freeze()  # what was made so far stays for good: no later collection needs to look at it
    logger.debug("loaded in %.2f s, on CPUs %s", facts.load_s, ", ".join(map(str, spec.cpus)) or "of its owner")
    tell(messages.Ready(facts, transport.published_address(socket, spec.tcp)))
    server.run()


def _ignore_group_signals() -> None:
    """Ctrl-C and its like reach the whole process group; the owner decides what they mean, and was started first."""
    ignored = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)  # blocked while the interpreter started


def _take_over_stdio(stderr_path: str) -> None:
    """Write stderr to the file that the supervisor reads its end of, and read nothing from the user's terminal."""
    try:
        log = os.open(stderr_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except FileNotFoundError:
        os._exit(0)  # the folder is gone, and so is the owner
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(log, 2)
    os.dup2(null, 0)
    os.dup2(null, 1)
    for descriptor in (log, null):
        if descriptor > 2:
            os.close(descriptor)


def _follow_owner(lifeline: Connection, folder: str, relay: LogRelay) -> None:
    """End with the owner; until then it says what it wants to hear."""
    try:
        while True:
            wanted = messages.decode(messages.log_levels_decoder, lifeline.recv_bytes())
            if wanted is not None:
                relay.set_levels(wanted.levels)
    except (EOFError, OSError):
        try:
            transport.remove_runtime_folder(folder)  # an owner that was killed could not
        finally:
            os._exit(0)


def _make_runner(spec: EngineSpec, progress: Callable[[str, float], None]) -> Runner:
    # Imported here: a simulated engine loads nothing that computes.
    if isinstance(spec.model, SimulatedModel):
        from asyncscale.model.simulation import SimulatedRunner

        return SimulatedRunner(spec.model, spec.config)
    progress("import", 0.0)
    from asyncscale.model.runner import ModelRunner

    return ModelRunner(spec, progress)
