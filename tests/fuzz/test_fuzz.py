"""Coverage-guided fuzzing of what decodes and of who handles it: an engine, a coordinator, and a client.

A case is a few messages, one after the other. Those that reach a line of the package from a line that never led there
before are kept, and changed further: as values (fields replaced, dropped, repeated) and as bytes. For longer than the
suite does, with a seed of its own::

    python tests/fuzz/test_fuzz.py 600

A case that raises is written to the corpus, beside those that once did; all of them are replayed by the suite.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import msgspec
import numpy as np
import pytest
import zmq

import asyncscale
from asyncscale import SamplingParams, SimulatedModel, messages, transport
from asyncscale.client.coordinator import Coordinator
from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.engines import AttachedEngines
from asyncscale.client.options import Limits
from asyncscale.client.policies import least_loaded
from asyncscale.client.preparation import Preparation
from asyncscale.client.roster import Roster
from asyncscale.client.stream import RequestStream
from asyncscale.config import EngineConfig
from asyncscale.engine.core import EngineCore
from asyncscale.engine.server import EngineServer
from asyncscale.metrics import Metrics
from asyncscale.metrics.catalog import ENGINE_LAYOUT, REQUEST_LAYOUT
from asyncscale.model.simulation import SimulatedRunner
from asyncscale.params import Sampling
from asyncscale.tokenization.simulated import SimulatedTokenizer

PACKAGE = str(Path(asyncscale.__file__).parent)
CORPUS = Path(__file__).parent / "corpus"
MODEL = SimulatedModel(base_ms=0, decode_us=0, prefill_us=0, vocab_size=300, max_model_len=64, num_kv_blocks=64)
FACTS = messages.EngineFacts(300, 64, 64, 16, 64, "simulated", 0.0)
LOAD = messages.Load(1, 2, 3, 1, 100, 50, 7, 64)
LOGPROBS = messages.TokenLogprobs([7, 8, 9], [-0.1, -2.0, -3.0], 1)

Case = list[bytes]
Context = zmq.Context[zmq.Socket[bytes]]


class Target(Protocol):
    """What is fuzzed: `seeds` are messages that make sense to it; `run` raises when it takes harm from a case."""

    seeds: list[Any]

    def run(self, case: Case) -> None: ...

    def close(self) -> None: ...


# --- targets


class EngineTarget:
    """An engine's server and core, with two clients that send in turn, and a few steps after each message."""

    seeds: list[Any] = [  # noqa: RUF012
        messages.Connect(1, True),
        messages.Add(1, b"\1\0\0\0" * 20, 20, Sampling(5, logprobs=2, prompt_logprobs=1, seed=3), n=2, weight=9),
        messages.Add(
            2, b"\1\0\0\0" * 9, 4, Sampling(9, 2, 1.0, 0.9, 5, 0.1, 1.2, 0.5, 0.5, 7, (5,), ((1, 2),), ((3, 1.0),))
        ),
        messages.Abort([1, 2, 3]),
        *(messages.Call(1, name, []) for name in ("kv_cache_stats", "reset_prefix_cache", "pause", "drain", "resume")),
        messages.Disconnect(),
    ]

    class _Socket:
        """Takes whatever is sent, and cannot reach the client that is called gone."""

        def send(self, frame: bytes, flags: int = 0) -> None:
            if frame == b"gone":
                raise zmq.ZMQError(zmq.EHOSTUNREACH)

    def run(self, case: Case) -> None:
        config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32)
        core = EngineCore(SimulatedRunner(MODEL, config), config)
        server = EngineServer(core, self._Socket(), num_engines=1)  # type: ignore[arg-type]
        for number, payload in enumerate(case):
            message = messages.decode(messages.to_engine_decoder, payload)
            if isinstance(message, messages.Call) and message.method == "profile":
                continue  # it takes the place of what measures coverage
            if message is not None:
                server._handle((b"one", b"two", b"gone")[number % 3], message)
            for _ in range(3):
                if core.has_work:
                    server._outputs = core.step()
                server._settle()
            while server._gone:
                server._forget(server._gone.pop())
            core.check_integrity()

    def close(self) -> None:
        pass


class ClientTarget:
    """A client with requests under way, which is sent each message by its coordinator and by all its engines."""

    seeds: list[Any] = [  # noqa: RUF012
        messages.Outputs([0, 1, 1], [72, 105, 256], [], LOAD, [(0, LOGPROBS)], [(0, [LOGPROBS])], {b"c": (1, 2)}),
        messages.Outputs(
            [2], [104], [messages.Finished(2, "stop", 104), messages.Finished(0, "error", None, "no")], LOAD
        ),
        messages.Outputs([5], [65], [], LOAD, started=[messages.Started(5, 0.25, 1.5, 16)], preempted=[1, 2]),
        messages.Outputs([], [], [messages.Finished(1, "length"), messages.Finished(0, "abort")], LOAD),
        messages.LoadReport(LOAD, {b"c": (1, 2)}),
        messages.CallResult(0, msgspec.Raw(b"\x01")),
        messages.Counts([(0, LOAD), (7, LOAD)]),
        messages.Joined(messages.Member(1, 0, "ipc:///tmp/nobody-1", FACTS, LOAD)),
        messages.Left(1, 0, "died", -9, "tail", True),
        messages.Left(0, 0, "died", None),
        messages.Welcome(
            1, MODEL, [messages.Member(0, 0, "ipc:///tmp/nobody-0", FACTS, LOAD)], [messages.Left(2, 1, "x", 1)]
        ),
        messages.CollectiveResult(0, [messages.EngineResult(0)]),
        messages.MetricsRound(3),
        messages.MetricsAnswer(0, {0: ENGINE_LAYOUT.zeros()}, {"c": {0: REQUEST_LAYOUT.zeros()}}),
        messages.Farewell(),
    ]

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="t-", dir="/tmp")
        self._context: Context = zmq.Context()
        self._address = transport.coordinator_address(self._folder.name)
        self._owner = transport.bind_router(self._context, self._address)
        self._codec = SimulatedTokenizer(MODEL)

    def run(self, case: Case) -> None:
        asyncio.run(_quietly(self._run(case)))

    async def _run(self, case: Case) -> None:
        dispatcher = Dispatcher(self._context, b"c", least_loaded, Limits())
        engines = AttachedEngines(self._context, b"c", self._address, dispatcher)
        engines._on_frames([messages.encoder.encode(self.seeds[-3])])
        streams = [self._stream(dispatcher, **params) for params in ({"n": 2, "logprobs": 1}, {"stop": "h"}, {})]
        for stream in streams:
            dispatcher.submit(stream)
        result = asyncio.ensure_future(dispatcher.call("kv_cache_stats", []))
        try:
            for payload in case:
                engines._on_frames([payload])
                for connection in list(dispatcher._fleet._connections.values()):
                    connection._on_frames([payload])
            for stream in streams:
                [choice.text() for choice in stream.choices]
                if not all(0 <= token_id < 300 for choice in stream.choices for token_id in choice.token_ids):
                    raise ValueError("a token that the model does not have")
                if stream.done and stream.error is None:
                    stream.completion()
            dispatcher.loads(), engines.roster.health(), engines.counts()
        finally:
            dispatcher.close(RuntimeError("over"))
            await engines.stop()
            await asyncio.gather(result, engines._welcome, return_exceptions=True)

    def _stream(self, dispatcher: Dispatcher, **params: Any) -> RequestStream:
        asked = SamplingParams(**params)
        return RequestStream(
            request_id=f"r{asked}",
            wire_id=dispatcher.allocate_wire_ids(asked.n),
            prompt_token_ids=np.array([1, 2, 3], np.int32),
            params=asked,
            sampling=Preparation(self._codec, FACTS).resolve(asked, 3),
            codec=self._codec,
            priority=0,
            session=None,
            pinned_engine=None,
            arrival=0.0,
            expected_output_tokens=10,
            on_end=dispatcher.request_ended,
        )

    def close(self) -> None:
        self._owner.close(linger=0)
        self._context.destroy(linger=0)
        self._folder.cleanup()


async def _quietly(run: Coroutine[Any, Any, None]) -> None:
    """Raises also what would only be logged."""
    logged: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: logged.append(context))
    await run
    gc.collect(0)
    if logged:
        raise RuntimeError(str(logged))


class CoordinatorTarget:
    """A coordinator with one engine, whose clients come, call, and cannot be reached."""

    seeds: list[Any] = [  # noqa: RUF012
        messages.Attach(1),
        messages.Detach(),
        messages.CollectiveCall(1, "kv_cache_stats", [msgspec.Raw(b"\x01")]),
        messages.MetricsReport({None: REQUEST_LAYOUT.zeros(), 0: [2**62] * REQUEST_LAYOUT.size}),
        messages.MetricsReport({7: REQUEST_LAYOUT.zeros()}, round_id=0),
        messages.MetricsQuery(1, fresh=False),
        messages.MetricsQuery(2, fresh=True),
    ]

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="t-", dir="/tmp")
        self._context: Context = zmq.Context()

    def run(self, case: Case) -> None:
        asyncio.run(_quietly(self._run(case)))

    async def _run(self, case: Case) -> None:
        dispatcher = Dispatcher(self._context, b"c", least_loaded, Limits())
        coordinator = Coordinator(self._context, self._folder.name, MODEL, Roster(dispatcher), dispatcher)
        try:
            coordinator.join(messages.Member(0, 0, "ipc:///tmp/nobody-0", FACTS, LOAD))
            for number, payload in enumerate(case):
                identity = b"peer %d" % (number % 2)
                coordinator._on_frames([identity, payload])
                coordinator._on_load_report(0, messages.LoadReport(LOAD, {identity: (1, 2)}))
                coordinator._publish()
                await asyncio.sleep(0)
        finally:
            dispatcher.close(RuntimeError("over"))
            coordinator.close()
            await asyncio.gather(*coordinator._calls, return_exceptions=True)
            Metrics("", "", coordinator._metrics.counts(), lambda: None).requests  # noqa: B018

    def close(self) -> None:
        self._context.destroy(linger=0)
        self._folder.cleanup()


TARGETS: dict[str, Callable[[], Target]] = {
    "engine": EngineTarget,
    "client": ClientTarget,
    "coordinator": CoordinatorTarget,
}


# --- the fuzzer


class Coverage:
    """Steps from line to line of the package that were ever taken."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()

    @contextmanager
    def measured(self) -> Iterator[set[tuple[str, int, int]]]:
        """The steps that were taken inside and never before; they count as seen afterwards."""
        taken: set[tuple[str, int, int]] = set()
        previous = sys.gettrace()
        sys.settrace(lambda frame, event, argument: _tracer(frame, taken))
        try:
            fresh: set[tuple[str, int, int]] = set()
            yield fresh
        finally:
            sys.settrace(previous)
            fresh |= taken - self.seen
            self.seen |= taken


def _tracer(frame: FrameType, taken: set[tuple[str, int, int]]) -> Any:
    name = frame.f_code.co_filename
    if not name.startswith(PACKAGE):
        return None
    last = 0

    def trace_line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal last
        if event == "line":
            taken.add((name, last, frame.f_lineno))
            last = frame.f_lineno
        return trace_line

    return trace_line


INTERESTING: list[Any] = [
    None, True, 0, 1, -1, 2, 3, 7, 64, 255, 256, 300, 65_536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1,
    -(2**63), 0.0, -1.0, 1e308, float("inf"), float("nan"), "", "stop", "error", "\0", "x" * 300, b"", b"\0",
    b"\xff" * 9, [], {}, [[]], "ipc://x", "tcp://1.2.3.4:5/?key=" + "0" * 64, "tcp://x:99999/", "inproc://x",
]  # fmt: skip


class Fuzzer:
    """Makes cases for a target and runs them. All of it raises Finding at the first that does harm."""

    def __init__(self, target: Target, seed: int) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._seeds = [messages.encoder.encode(message) for message in target.seeds]
        self._pool: list[Case] = []
        self.coverage = Coverage()
        self.num_run = 0

    def start(self) -> None:
        """Run what makes sense, each message alone and all in a row."""
        for case in [[], *([seed] for seed in self._seeds), self._seeds, self._seeds[::-1]]:
            self.try_case(case)

    def run(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        """Run one new case."""
        case = list(self._random.choice(self._pool))
        for _ in range(self._random.randrange(1, 4)):
            self._change(case)
        self.try_case(case[:12])

    def try_case(self, case: Case) -> None:
        """Run it, and keep it if it went where none before it did."""
        self.num_run += 1
        with self.coverage.measured() as fresh:
            try:
                self._target.run(case)
            except Exception as error:
                raise Finding(case) from error
        if fresh:
            self._pool.append(case)

    def _change(self, case: Case) -> None:
        choose = self._random.randrange(8)
        if choose == 0 or not case:
            case.insert(self._random.randrange(len(case) + 1), self._random.choice(self._seeds))
        elif choose == 1:
            case.append(self._random.choice(case))  # replayed
        elif choose == 2:
            case.pop(self._random.randrange(len(case)))
        else:
            index = self._random.randrange(len(case))
            case[index] = self._change_bytes(case[index]) if choose == 3 else self._change_value(case[index])

    def _change_bytes(self, payload: bytes) -> bytes:
        changed = bytearray(payload or b"\0")
        for _ in range(self._random.randrange(1, 4)):
            changed[self._random.randrange(len(changed))] = self._random.randrange(256)
        return bytes(changed[: self._random.randrange(len(changed) + 1)] if self._random.random() < 0.2 else changed)

    def _change_value(self, payload: bytes) -> bytes:
        try:
            tree = [msgspec.msgpack.decode(payload)]
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return self._change_bytes(payload)
        node: list[Any] = tree
        while True:  # down to some list, and one of its items
            index = self._random.randrange(len(node)) if node else 0
            if node and isinstance(node[index], list) and node[index] and self._random.random() < 0.9:
                node = node[index]
                continue
            break
        self._change_item(node, index)
        try:
            return msgspec.msgpack.encode(tree[0] if tree else None)
        except (msgspec.MsgspecError, ValueError, OverflowError, UnicodeEncodeError):
            return payload

    def _change_item(self, node: list[Any], index: int) -> None:
        choose = self._random.randrange(6)
        value = node[index] if index < len(node) else None
        if choose == 0 and node:
            node.pop(index)
        elif choose == 1 and node:
            node.insert(index, value)
        elif choose == 2 and isinstance(value, int):
            node[index] = value + self._random.choice((-1, 1))
        elif choose == 3 and node:
            node[index] = self._random.choice(node)
        else:
            node[index : index + 1] = [self._random.choice(INTERESTING)]


class Finding(Exception):
    """A case that raised."""

    def __init__(self, case: Case) -> None:
        super().__init__(f"a case of {len(case)} messages raised: {case!r}")
        self.case = case


# --- the suite


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    target = TARGETS[request.param]()
    yield target
    target.close()


def test_nothing_that_is_found_in_a_short_while_does_harm(target: Target) -> None:
    fuzzer = Fuzzer(target, seed=1)
    fuzzer.start()
    at_start = len(fuzzer.coverage.seen)
    fuzzer.run(400)
    assert len(fuzzer.coverage.seen) > at_start  # it is guided


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda path: path.name)
def test_what_once_did_harm_does_none(path: Path) -> None:
    target = TARGETS[path.name.partition("-")[0]]()
    try:
        target.run(msgspec.msgpack.decode(path.read_bytes(), type=list[bytes]))
    finally:
        target.close()


def test_harm_is_found() -> None:
    class Harmed(EngineTarget):
        def run(self, case: Case) -> None:
            super().run(case)
            for message in map(messages.to_engine_decoder.decode, case):
                if isinstance(message, messages.Add) and message.n == 3:
                    raise IndexError

    fuzzer = Fuzzer(Harmed(), seed=1)
    fuzzer.start()
    with pytest.raises(Finding):
        fuzzer.run(20_000)


def main(seconds: float) -> None:
    """Fuzz all targets in turn."""
    logging.disable()
    seed = random.randrange(2**32)
    for name, make in TARGETS.items():
        target = make()
        fuzzer, end = Fuzzer(target, seed), time.monotonic() + seconds / len(TARGETS)
        try:
            fuzzer.start()
            while time.monotonic() < end:
                fuzzer.step()
        except Finding as finding:
            path = CORPUS / f"{name}-{seed}-{fuzzer.num_run}"
            path.write_bytes(msgspec.msgpack.encode(finding.case))
            print(f"{path}: {finding.__cause__!r}")
            raise
        finally:
            target.close()
            print(f"{name}: seed {seed}, {fuzzer.num_run} cases, {len(fuzzer.coverage.seen)} steps between lines")


if __name__ == "__main__":
    main(float(sys.argv[1]))
