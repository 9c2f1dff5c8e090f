"""Requests to engines and tokens back.

One connection per engine, the router, and the requests that wait for a free slot.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from asyncscale import messages, transport
from asyncscale.client.loop_socket import LoopSocket
from asyncscale.client.router import EngineLoad, Policy, Router, RoutingRequest
from asyncscale.client.stream import ChoiceStream, RequestStream
from asyncscale.errors import EngineDeadError, EngineError, RequestAbortedError

logger = logging.getLogger(__name__)

# An engine answers between two steps.
_CONNECT_TIMEOUT_S = 30.0

LoadWatcher = Callable[[int, messages.LoadReport], None]


class Dispatcher:
    """Sends each request to the engine that the router picks, and each token to the stream that waits for it.

    While every engine is full, requests are held back here, best priority first, and go to the first engine with a
    free slot: so nothing waits at one engine while another has room.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        identity: bytes,
        policy: Policy,
        on_load_report: LoadWatcher | None = None,
    ) -> None:
        self._context = context
        self._identity = identity
        self._on_load_report = on_load_report
        self._loop = asyncio.get_running_loop()
        self._router = Router(policy)
        self._connections: dict[int, _Connection] = {}
        self._choices: dict[int, ChoiceStream] = {}  # by wire id
        self._requests: dict[str, RequestStream] = {}  # live ones, by their caller's id
        self._held: list[tuple[int, int, RequestStream]] = []  # heap of (priority, order, request)
        self._dispatching: asyncio.Handle | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._next_wire_id = 0
        self._load_waiters: set[asyncio.Future[None]] = set()
        self._last_death: EngineDeadError | None = None
        self.num_malformed = 0

    # --- engines

    async def join(self, engine_id: int, address: str, facts: messages.EngineFacts) -> None:
        """Connect to an engine; it takes requests when this returns.

        Raises EngineDeadError when it dies meanwhile, and EngineError when it does not answer.
        """
        connection = _Connection(self, engine_id, facts)
        socket = transport.connect_dealer(self._context, address, self._identity)
        connection.socket = LoopSocket(self._loop, socket, connection.on_frames)
        self._connections[engine_id] = connection
        connection.send(messages.Connect(messages.PROTOCOL_VERSION, watch_loads=self._on_load_report is not None))
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await connection.connected
        except TimeoutError:
            error = EngineError(f"engine {engine_id} does not answer", engine_id=engine_id)
            connection.close(error)
            del self._connections[engine_id]
            raise error from None
        self._router.join(engine_id, facts.max_num_seqs)
        self._router.report(engine_id, connection.first_load, time.monotonic())
        self._dispatch_held()

    def leave(self, engine_id: int, error: EngineDeadError) -> None:
        """An engine is gone: what it sent last still counts, and what it left undone goes on at another engine.

        A request that was pinned to it, that loses an engine for the second time, or that finds no other one, fails
        with `error`.
        """
        connection = self._connections.pop(engine_id, None)
        if connection is None:
            return
        connection.socket.drain()
        connection.close(error)
        self._router.leave(engine_id)
        self._last_death = error
        for request in list(self._requests.values()):
            if not self._connections:
                request.fail(error)
            elif request.engine_id == engine_id:
                self._move(request, error)
        self._dispatch_held()
        self._notify_loads()

    def _move(self, request: RequestStream, error: EngineDeadError) -> None:
        if request.pinned_engine is not None or request.num_moves:
            request.fail(error)  # a request that takes engines down must not take them all
            return
        request.num_moves += 1
        request.engine_id = None
        for choice in request.open_choices:
            # A new id: the old one may still be in a message that has not arrived.
            del self._choices[choice.wire_id]
            choice.wire_id = self.allocate_wire_ids(1)
            self._choices[choice.wire_id] = choice
        self._hold(request)

    def loads(self) -> tuple[EngineLoad, ...]:
        """Every engine's load, in engine order."""
        return tuple(self._router.loads(time.monotonic()))

    def report(self, engine_id: int, load: messages.Load) -> None:
        """An engine's counts, from wherever they came."""
        self._router.report(engine_id, load, time.monotonic())
        self._notify_loads()
        self._dispatch_held()

    async def wait_load_change(self) -> None:
        """Return when any engine's counts have changed."""
        waiter = self._loop.create_future()
        self._load_waiters.add(waiter)
        try:
            await waiter
        finally:
            self._load_waiters.discard(waiter)

    # --- requests

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def is_live(self, request_id: str) -> bool:
        return request_id in self._requests

    def allocate_wire_ids(self, count: int) -> int:
        """The first of `count` consecutive ids that were never used before."""
        first = self._next_wire_id
        self._next_wire_id += count
        return first

    def submit(self, request: RequestStream) -> None:
        """Send the request now, or hold it until an engine has a free slot.

        Raises EngineDeadError when no engine is left.
        """
        if not self._connections and self._last_death is not None:
            raise self._last_death.with_traceback(None)
        self._requests[request.request_id] = request
        for choice in request.choices:
            self._choices[choice.wire_id] = choice
        if request.pinned_engine is not None:
            self._send(request, request.pinned_engine)
            return
        self._hold(request)
        self._dispatch_held()

    def abort(self, request: RequestStream, error: Exception) -> None:
        """End the request with `error`, here at once and on its engine as soon as it hears."""
        self._abort_on_engine(request, [choice.wire_id for choice in request.open_choices])
        request.fail(error)

    def request_ended(self, request: RequestStream) -> None:
        """Forget a request that has all its tokens or failed. Called by its stream."""
        self._requests.pop(request.request_id, None)
        for choice in request.choices:
            self._choices.pop(choice.wire_id, None)

    async def wait_idle(self) -> None:
        """Return when no request is live."""
        while self._requests:
            await next(iter(self._requests.values())).wait_end()

    def _hold(self, request: RequestStream) -> None:
        heapq.heappush(self._held, (request.priority, request.order, request))

    def _dispatch_held_soon(self) -> None:
        # Not at once: of many that are aborted together, those held back must not be sent only to be aborted, too.
        if self._held and self._dispatching is None:
            self._dispatching = self._loop.call_soon(self._dispatch_held)

    def _dispatch_held(self) -> None:
        self._dispatching = None
        while self._held:
            request = self._held[0][2]
            if request.done:
                heapq.heappop(self._held)
                continue
            wanted = RoutingRequest(len(request.prompt_token_ids), request.session)
            engine_id = self._router.pick(wanted, time.monotonic())
            if engine_id is None:
                return
            heapq.heappop(self._held)
            self._send(request, engine_id)

    def _send(self, request: RequestStream, engine_id: int) -> None:
        for message in request.messages():
            self._connections[engine_id].send(message)
            self._router.sent(engine_id, message.n)
        request.engine_id = engine_id

    def _abort_on_engine(self, request: RequestStream, wire_ids: list[int]) -> None:
        connection = self._connections.get(request.engine_id) if request.engine_id is not None else None
        if connection is not None and wire_ids:
            self._router.ended(connection.engine_id, len(wire_ids))
            connection.send(messages.Abort(wire_ids))
            self._dispatch_held_soon()

    # --- calls

    async def call(self, engine_id: int, method: str, args: Sequence[object]) -> Any:
        """Run a registered method on one engine. Raises EngineError with what the engine said, if it refused."""
        connection = self._connections[engine_id]
        call_id = next(self._call_ids)
        connection.send(messages.Call(call_id, method, [msgspec.Raw(messages.encoder.encode(arg)) for arg in args]))
        future = self._calls[call_id] = self._loop.create_future()
        connection.calls.add(call_id)
        try:
            return await future
        finally:
            del self._calls[call_id]
            connection.calls.discard(call_id)

    @property
    def engine_ids(self) -> tuple[int, ...]:
        """The engines that are connected, in order."""
        return tuple(sorted(self._connections))

    # --- what engines say

    def on_message(self, connection: _Connection, message: messages.FromEngine) -> None:
        """Take one message of an engine."""
        match message:
            case messages.Outputs():
                self._on_outputs(connection.engine_id, message)
                self.report(connection.engine_id, message.load)
            case messages.LoadReport():
                if self._on_load_report is not None:
                    self._on_load_report(connection.engine_id, message)
                self.report(connection.engine_id, message.load)
            case messages.CallResult():
                _answer(self._calls.get(message.call_id), connection.engine_id, message)
            case messages.Connected():
                connection.set_connected(message.load)

    def _on_outputs(self, engine_id: int, outputs: messages.Outputs) -> None:
        now = time.monotonic()
        choices = self._choices
        to_check: list[ChoiceStream] = []
        touched: list[RequestStream] = []
        for index, logprobs in outputs.logprobs:
            choice = choices.get(outputs.request_ids[index])
            if choice is not None:
                choice.logprobs.append(logprobs)
        for request_id, prompt_logprobs in outputs.prompt_logprobs:
            choice = choices.get(request_id)
            if choice is not None and choice.index == 0:
                choice.request.prompt_logprobs.extend(prompt_logprobs)
        for wire_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
            choice = choices.get(wire_id)
            if choice is None:
                continue  # it ended here before its engine knew
            choice.push(token_id)
            request = choice.request
            if request.first_token_at is None:
                request.first_token_at = now
            request.last_token_at = now
            touched.append(request)
            if choice.has_stop_strings:
                to_check.append(choice)
        for finished in outputs.finished:
            self._on_finished(engine_id, finished)
        stopped = [choice for choice in to_check if choice.check_stop_strings()]
        for choice in stopped:
            choices.pop(choice.wire_id, None)
            self._abort_on_engine(choice.request, [choice.wire_id])
        for request in touched:
            request.wake()

    def _on_finished(self, engine_id: int, finished: messages.Finished) -> None:
        choice = self._choices.pop(finished.request_id, None)
        if choice is None:
            return
        self._router.ended(engine_id)
        request = choice.request
        if choice.index == 0:
            request.queued_s = finished.queued_s
            request.num_cached_tokens = finished.num_cached_tokens
        request.num_preemptions += finished.num_preemptions
        if finished.reason in ("stop", "length"):
            choice.finish(finished.reason, finished.stop_token_id)
        elif finished.reason == "abort":
            self.abort(request, RequestAbortedError(f"request {request.request_id!r} was aborted by its engine"))
        else:
            choice.finish_reason = "error"  # its engine has ended it already
            self.abort(request, EngineError(finished.error or "the engine gave no reason", engine_id=engine_id))

    def _notify_loads(self) -> None:
        for waiter in self._load_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._load_waiters.clear()

    def close(self, error: Exception) -> None:
        """End every request with `error`, tell the engines that this client leaves, and close the sockets."""
        for request in list(self._requests.values()):
            self.abort(request, error)
        for connection in self._connections.values():
            connection.send(messages.Disconnect())
            connection.close(error)
        self._connections.clear()
        self._notify_loads()


class _Connection:
    """The DEALER to one engine."""

    def __init__(self, dispatcher: Dispatcher, engine_id: int, facts: messages.EngineFacts) -> None:
        self._dispatcher = dispatcher
        self.engine_id = engine_id
        self.facts = facts
        self.calls: set[int] = set()
        self.connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.first_load: messages.Load
        self.socket: LoopSocket

    def send(self, message: messages.ToEngine) -> None:
        self.socket.send(messages.encoder.encode(message))

    def set_connected(self, load: messages.Load) -> None:
        self.first_load = load
        if not self.connected.done():
            self.connected.set_result(None)

    def on_frames(self, frames: list[bytes]) -> None:
        message = messages.decode(messages.from_engine_decoder, frames[0])
        if message is None:
            self._dispatcher.num_malformed += 1
        else:
            self._dispatcher.on_message(self, message)

    def close(self, error: Exception) -> None:
        if not self.connected.done():
            self.connected.set_exception(error)
        for call_id in self.calls:
            future = self._dispatcher._calls.get(call_id)
            if future is not None and not future.done():
                future.set_exception(error)
        self.socket.close()


def _answer(future: asyncio.Future[Any] | None, engine_id: int, result: messages.CallResult) -> None:
    if future is None or future.done():
        return
    if result.error is not None:
        future.set_exception(EngineError(result.error, engine_id=engine_id))
    else:
        future.set_result(msgspec.msgpack.decode(result.value))
