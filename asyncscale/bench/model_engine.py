"""An engine in this process, which tells what each part of its steps took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from asyncscale import messages, transport
from asyncscale.config import CheckpointFiles, EngineConfig, EngineSpec
from asyncscale.engine.batch import Batch, StepResult
from asyncscale.engine.core import EngineCore
from asyncscale.engine.server import EngineServer
from asyncscale.errors import ModelLoadError
from asyncscale.kernels.library import PHASES
from asyncscale.model.native_decoder import NativeDecoder
from asyncscale.model.runner import ModelRunner
from asyncscale.params import Sampling

# Of a step's time: the kernels' phases, then what Python does around them.
PYTHON_PARTS = ("sampling", "batch", "scheduling", "messages")
PARTS = (*PHASES, "calls", *PYTHON_PARTS)

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """starts, counts: of each sequence, the position of its first new token and how many there are.

    num_logits: tokens that were sampled. seconds: of each of PARTS; "calls" is what entering the library and waking its
    threads takes, "batch" the arrays that it is given. They add up to the whole step, from one to the next.
    """

    starts: Int32
    counts: Int32
    num_decodes: int
    num_logits: int
    seconds: dict[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def python_s(self) -> float:
        """All but the kernels and their calls."""
        return sum(self.seconds[part] for part in PYTHON_PARTS)


class MeasuredEngine:
    """What an engine process runs, sockets included, with a client that only sends.

    ::

        with measured_engine(files, EngineConfig(...)) as engine:
            steps = engine.run(prompts, Sampling(max_tokens=8))

    The last step of a run is missing: what follows it is no step.
    """

    def __init__(self, runner: ModelRunner, decoder: NativeDecoder, config: EngineConfig, folder: str) -> None:
        self.decoder = decoder
        self.max_model_len = runner.max_model_len
        self.vocab_size = runner.vocab_size
        core = EngineCore(runner, config)
        self._context = transport.make_context()
        address = f"ipc://{folder}/engine"
        self._router = transport.bind_router(self._context, address)
        self._client = transport.connect_dealer(self._context, address, bytes(messages.CLIENT_ID_SIZE + 1))
        self._server = EngineServer(core, self._router, num_engines=1)
        self._send(messages.Connect(messages.PROTOCOL_VERSION))
        self._watch = _Watch(core, runner, decoder)
        self._num_sent = 0

    def run(self, prompts: Sequence[Int32], sampling: Sampling) -> list[MeasuredStep]:
        """Serve requests that all come at once, to the end of the last one."""
        for prompt in prompts:
            self._num_sent += 1
            self._send(messages.Add(self._num_sent, prompt.astype("<i4").tobytes(), len(prompt), sampling))
        steps = self._watch.steps_of(self._server.run, len(prompts))
        self._client.poll(1000)
        while transport.receive(self._client) is not None:  # what is unread would wait here for ever
            pass
        return steps

    def close(self) -> None:
        for socket in (self._client, self._router):
            socket.close(linger=0)
        self._context.term()

    def _send(self, message: messages.Connect | messages.Add) -> None:
        transport.send(self._client, messages.encoder.encode(message))


@contextmanager
def measured_engine(files: CheckpointFiles, config: EngineConfig) -> Iterator[MeasuredEngine]:
    """Loads the model. Raises ModelLoadError, also where there are no native kernels for it."""
    folder = transport.choose_runtime_folder()
    spec = EngineSpec(engine_id=0, incarnation=0, num_engines=1, folder=folder, model=files, config=config)
    runner = ModelRunner(spec)
    if not isinstance(runner.decoder, NativeDecoder):
        raise ModelLoadError("the parts of a step are those of the native kernels, and these do not compute here")
    transport.make_runtime_folder(folder)
    try:
        engine = MeasuredEngine(runner, runner.decoder, config, folder)
        try:
            yield engine
        finally:
            engine.close()
    finally:
        transport.remove_runtime_folder(folder)


class _DoneError(Exception):
    """Ends the server's loop."""


@dataclass(slots=True)
class _Current:
    """A step under way."""

    began: float
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    batch: tuple[Int32, Int32, int] | None = None
    num_logits: int = 0


class _Watch:
    """Times the calls from each layer to the next, by putting itself between them."""

    def __init__(self, core: EngineCore, runner: ModelRunner, decoder: NativeDecoder) -> None:
        self._durations = decoder.durations
        self._current = _Current(time.perf_counter())
        self._steps: list[MeasuredStep] = []
        self._core = core
        self._num_unfinished = self._num_missing = 0
        self._add, self._step, self._execute = core.add, core.step, runner.execute
        _replace(core, "add", self._counted_add)
        _replace(core, "step", self._timed_step)
        _replace(runner, "execute", self._timed_execute)
        _replace(decoder, "forward", self._timed("native", decoder.forward))
        _replace(decoder, "logits", self._timed("native", decoder.logits))
        _replace(decoder, "best", self._timed("native", decoder.best))
        for name in ("take_best", "sample"):
            _replace(runner.sampler, name, self._timed("sampling", getattr(runner.sampler, name)))

    def steps_of(self, run: Callable[[], None], num_requests: int) -> list[MeasuredStep]:
        """What is computed while `run` runs, from when so many requests have arrived until they have ended."""
        self._steps, self._num_unfinished, self._num_missing = [], num_requests, num_requests
        self._core.pause()
        self._current = _Current(time.perf_counter())
        with suppress(_DoneError):
            run()
        return self._steps

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            self._current.seconds[part] += time.perf_counter() - began
            return result

        return timed

    def _counted_add(self, client: bytes, message: messages.Add) -> None:
        self._add(client, message)
        self._num_missing -= 1
        if not self._num_missing:
            self._core.resume()

    def _timed_step(self, meanwhile: Callable[[], None]) -> dict[bytes, messages.Outputs]:
        began = time.perf_counter()
        self._finish(began)
        self._durations.fill(0)
        outputs = self._step(self._timed("meanwhile", meanwhile))
        self._current.seconds["step"] = time.perf_counter() - began
        self._current.seconds["kernels"] = 0
        for phase, duration in zip(PHASES, self._durations.tolist(), strict=True):
            self._current.seconds[phase] = duration / 1e9
            self._current.seconds["kernels"] += duration / 1e9
        self._num_unfinished -= sum(len(one.finished) for one in outputs.values())
        if not self._num_unfinished:
            raise _DoneError
        return outputs

    def _timed_execute(self, batch: Batch, meanwhile: Callable[[], None]) -> StepResult:
        starts = batch.table.num_computed_tokens[batch.rows]
        self._current.batch = starts, batch.num_new_tokens.copy(), batch.num_decodes
        began = time.perf_counter()
        result = self._execute(batch, meanwhile)
        self._current.seconds["execute"] = time.perf_counter() - began
        self._current.num_logits = len(result.rows)
        return result

    def _finish(self, now: float) -> None:
        """Of the step that ends where the next one begins."""
        done, self._current = self._current, _Current(now)
        if done.batch is None:
            return
        starts, counts, num_decodes = done.batch
        spent = done.seconds
        seconds = {phase: spent[phase] for phase in PHASES} | {
            "calls": spent["native"] - spent["kernels"],
            "sampling": spent["sampling"],
            "batch": spent["execute"] - spent["native"] - spent["sampling"] - spent["meanwhile"],
            "scheduling": spent["step"] - spent["execute"],
            "messages": now - done.began - spent["step"] + spent["meanwhile"],
        }
        self._steps.append(MeasuredStep(starts, counts, num_decodes, done.num_logits, seconds))


def _replace(owner: object, name: str, function: Callable[..., Any]) -> None:
    setattr(owner, name, function)
