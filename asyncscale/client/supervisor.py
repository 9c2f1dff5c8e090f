"""Starts engine processes side by side, follows them while they load, and tells when one ends."""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from asyncscale import messages, transport
from asyncscale.client import child_process
from asyncscale.client.child_process import describe_exit
from asyncscale.client.spawn import start_process
from asyncscale.config import EngineConfig, EngineSpec, ModelSource
from asyncscale.engine.process import run_engine
from asyncscale.errors import EngineDeadError, EngineStartError, ModelLoadError

logger = logging.getLogger(__name__)

# An engine whose lifeline closed ends at once; this long until it is killed all the same.
_EXIT_GRACE_S = 2.0
_STDERR_TAIL_BYTES = 8192

LoadingCallback = Callable[[int, str, float], None]
DeathCallback = Callable[["EngineProcess", EngineDeadError], None]


@dataclass(frozen=True)
class Launch:
    """Which engines to start. timeout: seconds until all must be ready. on_loading: engine id, phase, fraction done."""

    model: ModelSource
    config: EngineConfig
    num_engines: int
    timeout: float
    on_loading: LoadingCallback


@dataclass(eq=False)
class EngineProcess:
    """One incarnation of an engine: its process, and what it said of itself."""

    spec: EngineSpec
    process: BaseProcess
    lifeline: Connection
    facts: messages.EngineFacts | None = None
    failure: messages.Failed | None = None

    @property
    def engine_id(self) -> int:
        return self.spec.engine_id

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def release(self) -> None:
        """Kill the process if it still runs, collect it, and close its descriptors."""
        self.lifeline.close()
        child_process.release(self.process)

    def stderr_tail(self) -> str:
        """The end of what the process wrote to stderr."""
        try:
            with open(self.spec.stderr_path, "rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _STDERR_TAIL_BYTES))
                return log.read().decode(errors="replace").strip()
        except OSError:
            return ""


class Supervisor:
    """Owns the engine processes of one client, and the private folder for their sockets and logs.

    A supervisor that is forgotten or whose interpreter exits takes its engines with it; one that is killed does, too:
    each engine ends when its lifeline closes.
    """

    def __init__(self, launch: Launch, on_death: DeathCallback) -> None:
        self._launch = launch
        self._on_death = on_death
        self.folder = transport.make_runtime_folder()
        self.engines: dict[int, EngineProcess] = {}
        self._logged: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._finalizer = weakref.finalize(self, _end_all, os.getpid(), self.engines, self.folder)

    async def start(self) -> None:
        """Start all engines at once and wait until all are ready; when one fails, stop all and raise.

        Raises EngineStartError (with the child's traceback), or the ModelLoadError that the child raised.
        """
        ready = [self._start_engine(engine_id) for engine_id in range(self._launch.num_engines)]
        try:
            async with asyncio.timeout(self._launch.timeout):
                await asyncio.gather(*ready)
        except TimeoutError:
            slow = next(engine for engine in self.engines.values() if engine.facts is None)
            error = EngineStartError(
                f"engine {slow.engine_id} was not ready within {self._launch.timeout:g} s",
                engine_id=slow.engine_id,
                stderr_tail=slow.stderr_tail(),
            )
            await self.stop()
            raise error from None
        except BaseException:
            await self.stop()
            raise

    def _start_engine(self, engine_id: int, incarnation: int = 0) -> asyncio.Future[None]:
        spec = EngineSpec(
            engine_id=engine_id,
            incarnation=incarnation,
            num_engines=self._launch.num_engines,
            folder=self.folder,
            model=self._launch.model,
            config=self._launch.config,
        )
        process, lifeline = start_process(spec.name, run_engine, spec)
        engine = EngineProcess(spec, process, lifeline)
        self.engines[engine_id] = engine
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(lifeline.fileno(), self._on_lifeline, engine, ready)
        self._loop.add_reader(process.sentinel, self._on_exit, engine, ready)
        return ready

    def _on_lifeline(self, engine: EngineProcess, ready: asyncio.Future[None]) -> bool:
        """Take what the engine says while it starts. Whether it may say more."""
        try:
            payload = engine.lifeline.recv_bytes()
        except (EOFError, OSError):
            self._loop.remove_reader(engine.lifeline.fileno())  # its exit follows, and tells the rest
            return False
        match messages.decode(messages.from_start_decoder, payload):
            case messages.Loading(phase, fraction):
                self._launch.on_loading(engine.engine_id, phase, fraction)
            case messages.Ready(facts):
                engine.facts = facts
                _resolve(ready, None)
            case messages.Logged(level, text):
                if text not in self._logged:  # by another engine
                    self._logged.add(text)
                    logger.log(level, "%s", text)
            case messages.Failed() as failure:
                engine.failure = failure  # raised when it has exited, with its exit code
        return True

    def _on_exit(self, engine: EngineProcess, ready: asyncio.Future[None]) -> None:
        self._unwatch(engine)
        while not ready.done() and _is_readable(engine.lifeline) and self._on_lifeline(engine, ready):
            pass  # the reason may have been sent just before the exit
        _resolve(ready, _start_error(engine))
        if engine.facts is not None and self.engines.get(engine.engine_id) is engine:
            del self.engines[engine.engine_id]
            transport.unlink_address(engine.spec.address)
            code = child_process.collect_exit_code(engine.process)
            error = EngineDeadError(
                f"engine {engine.engine_id} died ({describe_exit(code)})",
                engine_id=engine.engine_id,
                exit_code=code,
                stderr_tail=engine.stderr_tail(),
            )
            engine.release()
            self._on_death(engine, error)

    def _unwatch(self, engine: EngineProcess) -> None:
        self._loop.remove_reader(engine.process.sentinel)
        if not engine.lifeline.closed:
            self._loop.remove_reader(engine.lifeline.fileno())

    async def stop(self) -> None:
        """End all engines, collect them, and remove the folder. Bounded; idempotent."""
        engines = list(self.engines.values())
        self.engines.clear()
        for engine in engines:
            self._unwatch(engine)
            engine.lifeline.close()
        try:
            await asyncio.gather(*(child_process.wait_exit(engine.process, _EXIT_GRACE_S) for engine in engines))
        finally:
            self._finalizer.detach()
            for engine in engines:
                engine.release()
            transport.remove_runtime_folder(self.folder)


def _start_error(engine: EngineProcess) -> Exception:
    failure = engine.failure
    if failure is not None and failure.model_error is not None:
        return ModelLoadError(failure.model_error)
    code = child_process.collect_exit_code(engine.process)
    text = f"engine {engine.engine_id} did not start ({describe_exit(code)})"
    if failure is not None:
        text += f"\n--- traceback in the engine process ---\n{failure.traceback.strip()}"
    return EngineStartError(text, engine_id=engine.engine_id, exit_code=code, stderr_tail=engine.stderr_tail())


def _resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
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
    for engine in engines.values():
        engine.lifeline.close()
    for engine in engines.values():
        engine.process.join(_EXIT_GRACE_S)
        engine.release()
    transport.remove_runtime_folder(folder)
