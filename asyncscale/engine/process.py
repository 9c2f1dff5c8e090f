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
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

from asyncscale import messages, transport
from asyncscale.config import EngineSpec
from asyncscale.engine.log_relay import ROOT, LogRelay
from asyncscale.errors import ModelLoadError
from asyncscale.progress import Progress
from asyncscale.tandem.collective_errors import SteppedAloneError
from asyncscale.tandem.member import GroupMember, Mailbox
from asyncscale.tandem.messages import GroupState

if TYPE_CHECKING:
    from asyncscale.engine.server import EngineServer

logger = logging.getLogger(__name__)


def run_engine(spec: EngineSpec, lifeline: Connection) -> None:
    """Load the model of `spec`, tell the supervisor on `lifeline`, then serve until the lifeline closes."""
    if spec.cpus and hasattr(os, "sched_setaffinity"):  # macOS has no such thing
        with contextlib.suppress(OSError):  # they were taken from us since they were chosen
            os.sched_setaffinity(0, spec.cpus)  # before there is any other thread: those inherit it
    relay = LogRelay(lifeline)
    relay.set_levels(spec.log_levels)
    logging.getLogger(ROOT).addHandler(relay)
    mailbox = Mailbox()
    watched = (lifeline, spec.folder, relay, mailbox)
    threading.Thread(target=_follow_owner, args=watched, name="lifeline", daemon=True).start()
    _ignore_group_signals()
    while not os.path.exists(spec.progress_path):  # the owner makes it when there are engines to remove the folder
        time.sleep(0.001)
    _take_over_stdio(spec.stderr_path)
    faulthandler.enable(2)  # a crash in native code leaves a traceback there; sys.stderr may be None
    # numpy's BLAS is not used here, but would start its threads when numpy is imported: half of the import's CPU time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    engine = _Engine(spec, lifeline, mailbox)
    try:
        server = engine.load()
    except BaseException as error:
        engine.fail(error)
    gc.collect()
    gc.freeze()  # what was made so far stays for good: no later collection needs to look at it
    engine.serve(server)


class _Engine:
    """What the process makes of its spec, and tells on the lifeline."""

    def __init__(self, spec: EngineSpec, lifeline: Connection, mailbox: Mailbox) -> None:
        self._spec = spec
        self._lifeline = lifeline
        self._mailbox = mailbox

    def _tell(self, message: messages.FromEngineProcess) -> None:
        self._lifeline.send_bytes(messages.encoder.encode(message))

    def load(self) -> EngineServer:
        """The model, behind a socket that clients can connect to."""
        # Imported here, after numpy's threads were forbidden; and whoever starts engines imports this module, but needs
        # none of that.
        from asyncscale.engine.core import EngineCore
        from asyncscale.engine.make_runner import make_runner
        from asyncscale.engine.server import EngineServer
        from asyncscale.metrics.engine_counters import EngineCounters
        from asyncscale.tandem.core import TandemCore

        spec, started = self._spec, time.monotonic()
        progress = Progress(spec.progress_path)
        runner, group = make_runner(spec, progress, lambda phase, done: self._tell(messages.Loading(phase, done)))
        self._facts = messages.EngineFacts(
            vocab_size=runner.vocab_size,
            max_model_len=runner.max_model_len,
            max_num_seqs=spec.config.max_num_seqs,
            block_size=spec.config.block_size,
            num_blocks=runner.num_blocks,
            dtype=runner.dtype,
            load_s=time.monotonic() - started,
            pid=os.getpid(),
            in_tandem=spec.in_tandem,
            weight_version=spec.weight_version,
        )
        context = transport.make_context()
        self._socket = transport.bind_router(
            context,
            spec.address,
            tcp=spec.tcp,
            max_bytes=messages.MAX_REQUEST_BYTES + 4 * runner.max_model_len,
            heartbeat=True,
        )
        runner.progress = progress
        counters = EngineCounters(spec.counters_path)
        core = EngineCore(runner, spec.config, counters=counters, weight_version=spec.weight_version)
        member = GroupMember(TandemCore(core, runner, group), self._mailbox, self._tell) if group else None
        return EngineServer(core, self._socket, spec.num_engines, progress, counters, member)

    def serve(self, server: EngineServer) -> None:
        """For ever; the lifeline ends the process."""
        facts, cpus = self._facts, ", ".join(map(str, self._spec.cpus)) or "of its owner"
        logger.debug("loaded in %.2f s, on CPUs %s", facts.load_s, cpus)
        self._tell(messages.Ready(facts, transport.published_address(self._socket, self._spec.tcp)))
        try:
            server.run()
        except SteppedAloneError as error:
            self.fail(error)

    def fail(self, error: BaseException) -> NoReturn:
        """Say why the engine ends, and end."""
        model_error = str(error) if isinstance(error, ModelLoadError) else None
        is_final = isinstance(error, SteppedAloneError)
        self._tell(messages.Failed(traceback.format_exc(), model_error, is_final))
        sys.exit(1)


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


def _follow_owner(lifeline: Connection, folder: str, relay: LogRelay, mailbox: Mailbox) -> None:
    """End with the owner; until then it says what it wants to hear, and what it has decided of the group."""
    try:
        while True:
            match messages.decode(messages.to_engine_process_decoder, lifeline.recv_bytes()):
                case messages.LogLevels(levels):
                    relay.set_levels(levels)
                case GroupState() as state:
                    mailbox.put(state)
    except (EOFError, OSError):
        try:
            transport.remove_runtime_folder(folder)  # an owner that was killed could not
        finally:
            os._exit(0)
