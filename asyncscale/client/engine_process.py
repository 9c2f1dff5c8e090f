"""One incarnation of an engine as its owner sees it: a process, what it says of itself, and how it ends."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import msgspec

from asyncscale import messages, progress
from asyncscale.client import child_process
from asyncscale.client.child_process import describe_exit
from asyncscale.client.hang_detector import HangDetector, Observation
from asyncscale.config import EngineSpec
from asyncscale.errors import EngineDeadError, EngineError, EngineStartError

_STDERR_TAIL_BYTES = 8192


@dataclass(eq=False)
class EngineProcess:
    """started_at, ready_at: of the event loop's clock. facts, address: once it is ready. failure: why it did not start,
    if it could say so.

    hang_detector: None when nobody minds. verdict: why its owner killed it, if it did. hung: that was why.
    """

    spec: EngineSpec
    process: BaseProcess
    lifeline: Connection
    started_at: float
    hang_detector: HangDetector | None = None
    facts: messages.EngineFacts | None = None
    address: str = field(default="", repr=False)
    ready_at: float | None = None
    failure: messages.Failed | None = None
    verdict: str | None = field(default=None, init=False)
    hung: bool = field(default=False, init=False)

    @property
    def engine_id(self) -> int:
        return self.spec.engine_id

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def tell(self, message: messages.ToEngineProcess) -> None:
        """Send the process a message over its lifeline."""
        with contextlib.suppress(OSError):  # it has just ended
            self.lifeline.send_bytes(messages.encoder.encode(message))

    def kill(self, verdict: str) -> None:
        """End the process now. Its exit is noticed like any other."""
        self.verdict = verdict
        self.process.kill()

    def release(self) -> None:
        """Kill the process if it still runs, collect it, and close its descriptors."""
        self.lifeline.close()
        child_process.release(self.process)

    def remove_traces_of_predecessor(self) -> None:
        """The files of the incarnation before this one: by now everybody has read them."""
        if self.spec.incarnation:
            before = msgspec.structs.replace(self.spec, incarnation=self.spec.incarnation - 1)
            for path in (before.stderr_path, before.progress_path, before.counters_path):
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def hangs(self, now: float) -> bool:
        """Whether it shows no progress, and has not for so long that it never will. To be asked regularly."""
        seen = progress.look(self.spec.progress_path)
        if seen is None or self.hang_detector is None or self.pid is None:
            return False
        state, cpu_s = child_process.activity(self.pid)
        return self.hang_detector.observe(Observation(seen.ticks, seen.resting, state == "T", cpu_s), now)

    def error(self) -> EngineError:
        """How it ended, after its exit: EngineStartError when it was never ready, else EngineDeadError."""
        code = child_process.collect_exit_code(self.process)
        how = self.verdict or f"({describe_exit(code)})"
        if self.facts is not None:
            kind: type[EngineError] = EngineDeadError
            text = f"engine {self.engine_id} died {how}"
        else:
            kind = EngineStartError
            text = f"engine {self.engine_id} did not start {how}"
        if self.failure is not None:
            text += f"\n--- traceback in the engine process ---\n{self.failure.traceback.strip()}"
        return kind(text, engine_id=self.engine_id, exit_code=code, stderr_tail=self.stderr_tail())

    def stderr_tail(self) -> str:
        """The end of what the process wrote to stderr."""
        try:
            with open(self.spec.stderr_path, "rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _STDERR_TAIL_BYTES))
                return log.read().decode(errors="replace").strip()
        except OSError:
            return ""
