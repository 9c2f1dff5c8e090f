"""Real kernels, spoken to as a notebook does."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import KernelManager

import asyncscale

WIDGET = "application/vnd.jupyter.widget-view+json"

PREAMBLE = """
import asyncio
from asyncscale import AsyncScaleClient, SimulatedModel
"""


def kernel_environment() -> dict[str, str]:
    """In which a kernel imports the package that is tested."""
    return {**os.environ, "PYTHONPATH": str(Path(asyncscale.__file__).parent.parent)}


@dataclass
class Outcome:
    """What a cell's run wrote, showed and raised. displays: id -> what is shown there now; first_displays: what was
    shown at first."""

    number: int = 0  # N of In [N]
    stdout: str = ""
    stderr: str = ""
    error: str | None = None
    traceback: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)
    displays: dict[str, dict[str, Any]] = field(default_factory=dict)
    first_displays: list[dict[str, Any]] = field(default_factory=list)


class Kernel:
    """A kernel, and the frontend of a notebook that is open in it."""

    def __init__(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env=kernel_environment(), extra_arguments=["--log-level=ERROR"])
        self._connect()

    def _connect(self) -> None:
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.run(PREAMBLE)

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.manager.provisioner.pid)

    def engines(self) -> set[int]:
        """The pids of the engines that live."""
        children = self.process.children(recursive=True)
        return {child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())}

    def run(self, code: str, cell: str | None = None, interrupt_at: str | None = None, ok: bool = True) -> Outcome:
        """Run a cell, known to the frontend as `cell`, to its end. interrupt_at: when it has printed this."""
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        metadata = {} if cell is None else {"cellId": cell}
        request = self.client.session.msg("execute_request", content, metadata=metadata)
        self.client.shell_channel.send(request)
        outcome = Outcome()
        while not self._take(outcome, request["header"]["msg_id"]):
            if interrupt_at is not None and interrupt_at in outcome.stdout:
                self.manager.interrupt_kernel()
                interrupt_at = None
        assert not (ok and outcome.error), outcome.traceback
        return outcome

    def _take(self, outcome: Outcome, request_id: str) -> bool:
        """Whether the run is over."""
        message = self.client.get_iopub_msg(timeout=60)
        content = message["content"]
        if message["msg_type"] == "update_display_data":  # whichever cell's
            outcome.displays[content["transient"]["display_id"]] = content["data"]
        if message["parent_header"].get("msg_id") != request_id:
            return False
        match message["msg_type"]:
            case "execute_input":
                outcome.number = content["execution_count"]
            case "stream":
                setattr(outcome, content["name"], getattr(outcome, content["name"]) + content["text"])
            case "error":
                outcome.error, outcome.traceback = content["ename"], "\n".join(content["traceback"])
            case "execute_result":
                outcome.results.append(content["data"])
            case "display_data":
                outcome.first_displays.append(content["data"])
                outcome.displays[content.get("transient", {}).get("display_id", "")] = content["data"]
            case "status":
                return bool(content["execution_state"] == "idle")
        return False

    def close_clients(self) -> None:
        """As at the end of a notebook, all that were forgotten included."""
        self.run(
            "import gc\n"
            "for made in [thing for thing in gc.get_objects() if type(thing) is AsyncScaleClient]:\n"
            "    if hasattr(made, '_life') and made._life.loop is asyncio.get_running_loop():\n"
            "        await made.close(drain=False)"
        )
        assert self.engines() == set()

    def restart(self) -> None:
        """As the button does."""
        self.client.stop_channels()
        self.manager.restart_kernel(env=kernel_environment())
        self._connect()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


def wait_gone(pids: set[int], timeout: float = 10.0) -> None:
    """Poll for the end of processes of another process."""
    deadline = time.monotonic() + timeout
    while left := {pid for pid in pids if psutil.pid_exists(pid)}:
        assert time.monotonic() < deadline, f"{left} still live"
        time.sleep(0.01)
