"""The engine process: one thread that takes what the socket holds, steps, and sends. `run_engine` is its entry point.

A second thread only waits for the owner's end of the lifeline to close, and then ends the process: also while the model
loads, and in the middle of a step. It sleeps in `recv` and never competes for the interpreter.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import msgspec
import zmq

from asyncscale import messages, transport
from asyncscale.config import EngineSpec, SimulatedModel
from asyncscale.engine.core import EngineCore
from asyncscale.engine.runner import Runner
from asyncscale.errors import ModelLoadError


def run_engine(spec: EngineSpec, lifeline: Connection) -> None:
    """Load the model of `spec`, tell the supervisor on `lifeline`, then serve until the lifeline closes."""
    threading.Thread(target=_end_with_owner, args=(lifeline, spec.folder), name="lifeline", daemon=True).start()
    _ignore_group_signals()
    _take_over_stdio(spec.stderr_path)

    def tell(message: messages.FromStart) -> None:
        lifeline.send_bytes(messages.encoder.encode(message))

    try:
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
        )
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = transport.bind_router(context, spec.address)
        server = EngineServer(EngineCore(runner, spec.config), facts, socket)
    except BaseException as error:
        text = traceback.format_exc()
        tell(messages.Failed(text, str(error) if isinstance(error, ModelLoadError) else None))
        sys.exit(1)
    tell(messages.Ready(facts))
    server.run()


def _ignore_group_signals() -> None:
    """Ctrl-C and its like reach the whole process group; the owner decides what they mean, and was started first."""
    ignored = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
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


def _end_with_owner(lifeline: Connection, folder: str) -> None:
    try:
        while True:
            lifeline.recv_bytes()  # the owner sends nothing: this returns only by raising
    except (EOFError, OSError):
        try:
            transport.remove_runtime_folder(folder)  # an owner that was killed could not
        finally:
            os._exit(0)


def _make_runner(spec: EngineSpec, progress: Callable[[str, float], None]) -> Runner:
    # Imported here: a simulated engine never loads torch.
    if isinstance(spec.model, SimulatedModel):
        from asyncscale.model.simulation import SimulatedRunner

        return SimulatedRunner(spec.model, spec.config)
    progress("import", 0.0)
    from asyncscale.model.torch_runner import TorchRunner

    return TorchRunner(spec, progress)


class EngineServer:
    """An `EngineCore` behind a ROUTER socket."""

    def __init__(self, core: EngineCore, facts: messages.EngineFacts, socket: zmq.Socket[bytes]) -> None:
        self._core = core
        self._facts = facts
        self._socket = socket
        self._methods = {**core.methods, "process_info": self._process_info}
        self._watchers: set[bytes] = set()
        self._reported_version = core.load_version
        self.num_malformed = 0

    def run(self) -> None:
        """Serve for ever; the lifeline ends the process."""
        while True:
            self._receive()
            self._report_load()
            if self._core.has_work:
                for client, outputs in self._core.step().items():
                    self._send(client, outputs)
                self._report_load()

    def _receive(self) -> None:
        """Take all that has arrived; without work to do, sleep until something does."""
        if not self._core.has_work:
            self._socket.poll()
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2:
                self.num_malformed += 1
                continue
            message = messages.decode(messages.to_engine_decoder, frames[1])
            if message is None:
                self.num_malformed += 1
            else:
                self._handle(frames[0], message)

    def _handle(self, client: bytes, message: messages.ToEngine) -> None:
        match message:
            case messages.Add():
                self._core.add(client, message)
            case messages.Abort(request_ids):
                self._core.abort(client, request_ids)
            case messages.Call():
                self._send(client, self._call(message))
            case messages.Connect(version, watch_loads):
                if version != messages.PROTOCOL_VERSION:
                    self.num_malformed += 1
                    return
                if watch_loads:
                    self._watchers.add(client)
                self._send(client, messages.Connected(self._facts, self._core.load(client)))
            case messages.Disconnect():
                self._forget(client)

    def _call(self, call: messages.Call) -> messages.CallResult:
        method = self._methods.get(call.method)
        if method is None:
            known = ", ".join(sorted(self._methods))
            return messages.CallResult(call.call_id, error=f"unknown engine method {call.method!r}; known are {known}")
        try:
            value = method(*[msgspec.msgpack.decode(argument) for argument in call.args])
            return messages.CallResult(call.call_id, msgspec.Raw(messages.encoder.encode(value)))
        except Exception as error:  # the caller's arguments, not the engine, are at fault: tell the caller
            return messages.CallResult(call.call_id, error=f"{type(error).__name__}: {error}")

    def _process_info(self) -> dict[str, int]:
        """Of this process; num_malformed: messages that were dropped because they made no sense."""
        return {"pid": os.getpid(), "num_malformed": self.num_malformed}

    def _report_load(self) -> None:
        """Tell those who watch, as soon as a count changes: before the step as well as after it."""
        if not self._watchers or self._core.load_version == self._reported_version:
            return
        self._reported_version = self._core.load_version
        by_client = self._core.by_client()
        for client in list(self._watchers):
            self._send(client, messages.LoadReport(self._core.load(client), by_client))

    def _send(self, client: bytes, message: messages.FromEngine) -> None:
        try:
            self._socket.send_multipart([client, messages.encoder.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._forget(client)

    def _forget(self, client: bytes) -> None:
        self._watchers.discard(client)
        self._core.drop_client(client)
