"""Starts engine processes side by side, follows them while they load, and starts again those that die or hang."""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import msgspec

from asyncscale import messages, progress, transport
from asyncscale.address import TcpBinding
from asyncscale.client import child_process
from asyncscale.client.engine_logs import EngineLogs, wanted_levels
from asyncscale.client.engine_process import EngineProcess
from asyncscale.client.hang_detector import HangDetector
from asyncscale.client.placement import Place
from asyncscale.client.restarts import RestartHistory
from asyncscale.client.spawn import start_process
from asyncscale.config import EngineConfig, EngineSpec, ModelSource, step_in_tandem
from asyncscale.engine.process import run_engine
from asyncscale.errors import EngineError, EngineStartError, ModelLoadError
from asyncscale.metrics import engine_counters
from asyncscale.tandem.messages import Broken, FromTandemEngine, GroupState, Met, Paused

logger = logging.getLogger(__name__)

# An engine whose lifeline closed ends at once; this long until it is killed all the same.
_EXIT_GRACE_S = 2.0
# Engines' progress is looked at so often per hang_timeout, but not more often than every so many seconds.
_LOOKS_PER_TIMEOUT = 10
_LEAST_LOOK_INTERVAL_S = 0.05

# An engine that says more at once is no longer listened to.
_MAX_LIFELINE_BYTES = 2**24

LoadingCallback = Callable[[int, str, float], None]
# An engine takes requests from now on; how the incarnation before it ended.
ReadyCallback = Callable[[EngineProcess, messages.EngineFacts, str | None], None]
# An engine died; whether it is started again.
DeathCallback = Callable[[EngineProcess, EngineError, bool], None]
# An engine that steps together with others pauses, or has lost them.
ReportCallback = Callable[[FromTandemEngine], None]


@dataclass(frozen=True)
class Launch:
    """Which engines to start, and how often again.

    places: one for each engine; who is started again goes back there.
    timeout: seconds until all must be ready. on_loading: engine id, phase, fraction done.
    weight_version: how often the weights of `model` were changed. max_restarts, hang_timeout: see AsyncScaleClient.
    tcp: where they listen; None: in the private folder.
    """

    model: ModelSource
    config: EngineConfig
    places: Sequence[Place]
    timeout: float
    on_loading: LoadingCallback
    max_restarts: int
    hang_timeout: float | None
    tcp: TcpBinding | None = None
    weight_version: int = 0

    @property
    def in_tandem(self) -> bool:
        """Whether the engines step together."""
        return step_in_tandem(self.model, self.config, len(self.places))

    @property
    def look_interval(self) -> float:
        """Seconds between looks at the engines' progress, and at the log levels of this process."""
        return max((self.hang_timeout or 0.0) / _LOOKS_PER_TIMEOUT, _LEAST_LOOK_INTERVAL_S)


class Supervisor:
    """Owns the engine processes of one client, and the private folder for their sockets and logs.

    Until `wait_ready` returns, an engine that does not become ready ends the start; after that, one that dies, in
    whatever way and at whatever moment, is started again.
    A supervisor that is forgotten or whose interpreter exits takes its engines with it; one that is killed does, too:
    each engine ends when its lifeline closes.
    """

    def __init__(
        self, launch: Launch, on_ready: ReadyCallback, on_death: DeathCallback, on_report: ReportCallback
    ) -> None:
        self._launch = launch
        self._on_ready = on_ready
        self._on_death = on_death
        self._on_report = on_report
        self.folder = transport.choose_runtime_folder()
        self._has_folder = False
        self.engines: dict[int, EngineProcess] = {}
        self._histories = {i: RestartHistory(launch.max_restarts) for i in range(len(launch.places))}
        self._last_errors: dict[int, str] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}  # per engine that is not ready: its next start, or its limit
        self._looking: asyncio.TimerHandle | None = None
        self._starting: dict[int, asyncio.Future[None]] = {}  # engines that `wait_ready` waits for
        self._logs = EngineLogs()
        self._log_levels = wanted_levels()
        self._loop = asyncio.get_running_loop()
        self._finalizer = weakref.finalize(self, _end_all, os.getpid(), self.engines, self.folder)

    def spawn(self) -> None:
        """Start all engines at once, and make their folder."""
        for engine_id in range(len(self._launch.places)):
            self._starting[engine_id] = self._loop.create_future()
            self._start_engine(engine_id, 0)

    async def wait_ready(self) -> None:
        """Return when all engines are ready. When one fails, `stop` is what follows.

        Raises EngineStartError (with the child's traceback), or the ModelLoadError that the child raised.
        """
        try:
            async with asyncio.timeout(self._launch.timeout):
                await asyncio.gather(*self._starting.values())
        except TimeoutError:
            slow = next(engine for engine in self.engines.values() if engine.facts is None)
            raise self._too_slow(slow) from None
        if self._launch.hang_timeout is not None:
            self._look_later()

    def _start_engine(self, engine_id: int, incarnation: int) -> None:
        place = self._launch.places[engine_id]
        spec = EngineSpec(
            engine_id=engine_id,
            incarnation=incarnation,
            num_engines=len(self._launch.places),
            folder=self.folder,
            model=self._launch.model,
            weight_version=self._launch.weight_version,
            config=msgspec.structs.replace(self._launch.config, threads_per_engine=place.num_threads),
            tcp=self._launch.tcp,
            cpus=place.cpus,
            log_levels=self._log_levels,
        )
        process, lifeline = start_process(spec.name, run_engine, spec, self.folder)
        engine = EngineProcess(spec, process, lifeline, self._loop.time())
        if self._launch.hang_timeout is not None:
            engine.hang_detector = HangDetector(self._launch.hang_timeout, self._launch.look_interval)
        self.engines[engine_id] = engine
        self._loop.add_reader(lifeline.fileno(), self._on_lifeline, engine)
        self._loop.add_reader(process.sentinel, self._on_exit, engine)
        if not self._has_folder:  # not before there is an engine that removes it when this process is killed
            transport.make_runtime_folder(self.folder)
            self._has_folder = True
        engine_counters.make_file(spec.counters_path)  # before the other one, which the engine waits for
        progress.make_file(spec.progress_path)

    # --- what engines say

    def _on_lifeline(self, engine: EngineProcess) -> bool:
        """Take what the engine says while it starts, and what it logs. Whether it may say more."""
        try:
            payload = engine.lifeline.recv_bytes(_MAX_LIFELINE_BYTES)
        except (EOFError, OSError):
            self._loop.remove_reader(engine.lifeline.fileno())  # its exit follows, and tells the rest
            return False
        match messages.decode(messages.from_engine_process_decoder, payload):
            case messages.Loading(phase, fraction):
                self._launch.on_loading(engine.engine_id, phase, fraction)
            case messages.Ready(facts, address) if engine.facts is None:
                engine.address = address
                self._engine_ready(engine, facts)
            case messages.Logged() as logged:
                self._logs.take(engine.engine_id, engine.pid, logged, starting=engine.facts is None)
            case messages.Failed() as failure:
                engine.failure = failure  # raised when it has exited, with its exit code
            case Met() | Paused() | Broken() as report if engine.facts is not None:
                self._on_report(report)
        return True

    def tell_all(self, message: GroupState) -> None:
        """Send it to every engine, those that load included."""
        for engine in self.engines.values():
            engine.tell(message)

    def use_weights(self, model: ModelSource, version: int) -> None:
        """For all that start from now on; one that starts already is started once more."""
        self._launch = replace(self._launch, model=model, weight_version=version)

    def restart(self, engine_id: int, verdict: str) -> None:
        """Kill an engine, as it cannot go on with what the others do."""
        if engine_id in self.engines:
            self.engines[engine_id].kill(verdict)

    def _engine_ready(self, engine: EngineProcess, facts: messages.EngineFacts) -> None:
        if facts.weight_version != self._launch.weight_version:
            engine.kill(f"(the weights changed to version {self._launch.weight_version} while it started)")
            return
        engine.facts = facts
        engine.ready_at = self._loop.time()
        self._cancel_timer(engine.engine_id)
        engine.remove_traces_of_predecessor()
        logger.log(
            logging.WARNING if engine.spec.incarnation else logging.DEBUG,
            "engine %d is ready%s: process %s, model loaded in %.1f s",
            engine.engine_id,
            " again" if engine.spec.incarnation else "",
            engine.pid,
            facts.load_s,
            extra={"engine_id": engine.engine_id},
        )
        self._on_ready(engine, facts, self._last_errors.get(engine.engine_id))
        _resolve(self._starting.get(engine.engine_id), None)

    def _on_exit(self, engine: EngineProcess) -> None:
        while _is_readable(engine.lifeline) and self._on_lifeline(engine):
            pass  # the reason may have been sent just before the exit
        self._unwatch(engine)
        if self.engines.get(engine.engine_id) is not engine:
            return
        first_start = self._starting.get(engine.engine_id)
        if first_start is not None and not first_start.done():
            _resolve(first_start, _first_error(engine))  # that is the end of all
            return
        del self.engines[engine.engine_id]
        transport.unlink_address(engine.spec.address)
        self._engine_died(engine)
        engine.release()

    # --- engines that died

    def _engine_died(self, engine: EngineProcess) -> None:
        """Start it again, now or later or never, and tell."""
        engine_id = engine.engine_id
        self._cancel_timer(engine_id)
        error = engine.error()
        self._last_errors[engine_id] = str(error.args[0])
        now = self._loop.time()
        ready_at = now if engine.ready_at is None else engine.ready_at
        delay = self._histories[engine_id].died(now - ready_at, ready_at - engine.started_at)
        if engine.failure is not None and engine.failure.is_final:
            delay = None
        elif delay is None and self._launch.max_restarts:
            error.args = (f"{error.args[0]}; it is given up after {self._launch.max_restarts} restarts in a row",)
        if engine.facts is None:  # else whoever had heard that it was there says so
            logger.warning("%s", error, extra={"engine_id": engine_id})
        self._on_death(engine, error, delay is not None)
        if delay is not None:
            restart = self._loop.call_later(delay, self._restart, engine_id, engine.spec.incarnation + 1)
            self._timers[engine_id] = restart
            logger.info(
                "engine %d is started again in %.1f s (restart %d)",
                engine_id,
                delay,
                engine.spec.incarnation + 1,
                extra={"engine_id": engine_id},
            )

    def _restart(self, engine_id: int, incarnation: int) -> None:
        self._timers[engine_id] = self._loop.call_later(self._launch.timeout, self._end_slow, engine_id)
        self._start_engine(engine_id, incarnation)

    def _end_slow(self, engine_id: int) -> None:
        engine = self.engines[engine_id]
        engine.kill(f"(was not ready within {self._launch.timeout:g} s)")

    def _look_later(self) -> None:
        self._looking = self._loop.call_later(self._launch.look_interval, self._look)

    def _look(self) -> None:
        """Kill the engines that hang, and tell all what is to be logged when that has changed."""
        self._follow_log_levels()
        now = self._loop.time()
        for engine in self.engines.values():
            if engine.verdict is None and engine.hangs(now):
                engine.hung = True
                engine.kill("(it hung, without progress, and was killed)")
        self._look_later()

    def _follow_log_levels(self) -> None:
        levels = wanted_levels()
        if levels != self._log_levels:
            self._log_levels = levels
            for engine in self.engines.values():
                engine.tell(messages.LogLevels(levels))

    # --- the end

    def _cancel_timer(self, engine_id: int) -> None:
        timer = self._timers.pop(engine_id, None)
        if timer is not None:
            timer.cancel()

    def _unwatch(self, engine: EngineProcess) -> None:
        self._loop.remove_reader(engine.process.sentinel)
        if not engine.lifeline.closed:
            self._loop.remove_reader(engine.lifeline.fileno())

    def _too_slow(self, engine: EngineProcess) -> EngineStartError:
        return EngineStartError(
            f"engine {engine.engine_id} was not ready within {self._launch.timeout:g} s",
            engine_id=engine.engine_id,
            stderr_tail=engine.stderr_tail(),
        )

    async def stop(self) -> None:
        """End all engines, collect them, and remove the folder. Bounded; idempotent."""
        if self._looking is not None:
            self._looking.cancel()
        for engine_id in list(self._timers):
            self._cancel_timer(engine_id)
        engines = list(self.engines.values())
        self.engines.clear()
        for engine in engines:
            self._unwatch(engine)
            engine.lifeline.close()
        try:
            await child_process.wait_exits([engine.process for engine in engines], _EXIT_GRACE_S)
        finally:
            self._finalizer.detach()
            for engine in engines:
                engine.release()
            transport.remove_runtime_folder(self.folder)

    def abandon(self) -> None:
        """As `stop`, when nothing can be awaited: blocks until the engines have ended."""
        if not self._loop.is_closed():
            for engine in self.engines.values():
                self._unwatch(engine)
        self._finalizer()


def _first_error(engine: EngineProcess) -> Exception:
    """What the start of a client raises when this engine ended it."""
    failure = engine.failure
    if failure is not None and failure.model_error is not None:
        return ModelLoadError(failure.model_error)
    return engine.error()


def _resolve(future: asyncio.Future[None] | None, error: Exception | None) -> None:
    if future is None or future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # the first failure is raised; those of other engines are not "never retrieved"


def _is_readable(connection: Connection) -> bool:
    try:
        return not connection.closed and connection.poll()
    except (OSError, EOFError):
        return False


def _end_all(owner_pid: int, engines: dict[int, EngineProcess], folder: str) -> None:
    """For a client that was never closed: its loop is gone, so end the engines from here."""
    if os.getpid() != owner_pid:
        return  # a fork of the owner exits; the engines are not its own
    ending = list(engines.values())
    engines.clear()  # a loop that still runs, in a daemon thread, is to mind none of these exits
    for engine in ending:
        engine.lifeline.close()
    for engine in ending:
        engine.process.join(_EXIT_GRACE_S)
        engine.process.kill()
        engine.process.join(_EXIT_GRACE_S)
    transport.remove_runtime_folder(folder)
