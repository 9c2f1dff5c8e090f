"""Requests to engines and tokens back.

One connection per engine, the router, and the requests that wait for a free slot.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import zmq

from asyncscale import messages
from asyncscale.client.admission import Admission
from asyncscale.client.choice import ChoiceStream
from asyncscale.client.connection import EngineConnection
from asyncscale.client.exceptions import fresh
from asyncscale.client.hold_queue import HoldQueue
from asyncscale.client.options import Limits
from asyncscale.client.outages import Outages
from asyncscale.client.policies import EngineLoad, Policy, RoutingRequest
from asyncscale.client.router import Router
from asyncscale.client.stream import RequestStream
from asyncscale.errors import EngineDeadError, EngineError, RequestAbortedError

logger = logging.getLogger(__name__)

# The running mean of how many tokens requests make: where it begins, and how much the newest request counts.
_FIRST_MEAN_OUTPUT_TOKENS = 256.0
_MEAN_OUTPUT_WEIGHT = 0.05

# What an engine that comes later must be told as well.
_MODES = frozenset({"pause", "drain", "resume"})

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
        limits: Limits,
    ) -> None:
        self._context = context
        self._identity = identity
        self._load_watcher: LoadWatcher | None = None
        self._loop = asyncio.get_running_loop()
        self._router = Router(policy, first_turn=int.from_bytes(identity[-2:]))
        self._connections: dict[int, EngineConnection] = {}
        self._choices: dict[int, ChoiceStream] = {}  # by wire id
        self._requests: dict[str, RequestStream] = {}  # live ones, by their caller's id
        self._held = HoldQueue()
        self._admission = Admission(
            self._held, limits.max_queued_requests, limits.max_queued_tokens, self._num_waiting_at
        )
        self._dispatching: asyncio.Handle | None = None
        self._next_wire_id = 0
        self._mean_output_tokens = _FIRST_MEAN_OUTPUT_TOKENS
        self._load_waiters: set[asyncio.Future[None]] = set()
        self._mode: str | None = None  # the newest of _MODES that the engines were called to
        self._outages = Outages(limits.restart_timeout, self._on_outage_over)
        self._stranded: dict[int, dict[RequestStream, None]] = {}  # pinned to an engine that will return, in order
        self._deaths: dict[int, EngineDeadError] = {}  # of engines that are not back
        self.last_death: EngineDeadError | None = None
        self.num_malformed = 0  # messages of engines that were dropped because they made no sense
        self.on_unreachable: Callable[[messages.Member], None] = lambda member: None  # it is dead, and nobody said so

    # --- engines

    @property
    def engine_ids(self) -> tuple[int, ...]:
        """All engines, also those that died, in order."""
        return tuple(sorted({*self._connections, *self._deaths}))

    def join(self, member: messages.Member) -> None:
        """An engine takes requests from now on. Does nothing when it does already."""
        engine_id = member.engine_id
        if engine_id in self._connections:
            return
        self._connect(member)
        self._router.join(engine_id, member.facts.max_num_seqs)
        self._router.report(engine_id, member.load, time.monotonic())
        self._outages.end(engine_id)
        self._deaths.pop(engine_id, None)
        for request in self._stranded.pop(engine_id, ()):
            self._send_pinned(request)
        self._dispatch_held()
        self._notify_loads()

    def leave(self, error: EngineDeadError, *, returns: bool) -> None:
        """The engine of `error` is gone: what it sent last still counts; what it left undone goes on at another one.

        returns: it is started again: then a request that was pinned to it waits for it, and so do all when there is no
        other. A request that loses an engine for the second time fails, lest it take them all down one by one.
        Said again, with another error or another `returns`, of an engine that has not come back.
        """
        engine_id = error.engine_id
        self._deaths[engine_id] = self.last_death = error
        if returns:
            self._outages.begin(error)
        else:
            self._outages.end(engine_id)
        connection = self._connections.pop(engine_id, None)
        if connection is not None:
            logger.error("%s", error)
            connection.drain()
            connection.close(error)
            self._router.leave(engine_id)
            for request in [request for request in self._requests.values() if request.engine_id == engine_id]:
                self._rescue(request, error, was_aboard=request.sent_at < connection.last_step_began)
        self._fail_hopeless()
        self._dispatch_held()
        self._notify_loads()

    def _connect(self, member: messages.Member) -> None:
        connection = EngineConnection(self._context, self._identity, member, self._on_message, self._on_loss)
        self._connections[member.engine_id] = connection
        connection.connect(watch_loads=self._load_watcher is not None)
        if self._mode is not None:
            connection.call(self._mode, [])  # it was not there when the others were told, or not to be reached

    def _on_loss(self, connection: EngineConnection) -> None:
        """An engine cannot be reached any more. When it is dead, whoever knows that says `leave`; else it has dropped
        what this client had there, and what was left undone is done anew, there or elsewhere."""
        engine_id = connection.engine_id
        connection.drain()
        if connection.is_for_nobody:
            self.on_unreachable(connection.member)
            return
        logger.warning("the connection to engine %d was lost; its requests are sent again", engine_id)
        connection.close(EngineError(f"the connection to engine {engine_id} was lost", engine_id=engine_id))
        self._connect(connection.member)
        for request in [request for request in self._requests.values() if request.engine_id == engine_id]:
            num_open = len(request.open_choices)
            self._router.ended(engine_id, num_open, num_open * request.weight)
            self._move(request)
        self._dispatch_held()

    async def wait_engine(self) -> None:
        """Return when an engine takes requests. Raises EngineDeadError when none will."""
        while not self._connections:
            self._check_hope(None)
            await self.wait_load_change()

    def _rescue(self, request: RequestStream, error: EngineDeadError, was_aboard: bool) -> None:
        """The request was sent to an engine that died. was_aboard: it may have been in the engine's last step."""
        request.num_deaths += was_aboard
        if request.num_deaths < 2:
            self._move(request)
            return
        request.fail(
            EngineDeadError(
                f"request {request.request_id!r} was aboard two engines that died; the second: {error.args[0]}",
                engine_id=error.engine_id,
                exit_code=error.exit_code,
                stderr_tail=error.stderr_tail,
            )
        )

    def _move(self, request: RequestStream) -> None:
        """Have what is left of the request done anew."""
        request.num_moves += 1
        request.engine_id = None
        for choice in request.open_choices:
            # A new id: the old one may still be in a message that has not arrived.
            del self._choices[choice.wire_id]
            choice.wire_id = self.allocate_wire_ids(1)
            self._choices[choice.wire_id] = choice
        if request.pinned_engine is None:
            self._held.push(request)
        else:
            self._send_pinned(request)

    def _send_pinned(self, request: RequestStream) -> None:
        """To its engine, now or when that is back."""
        engine_id = request.pinned_engine
        if engine_id is None or request.done:
            return
        if engine_id in self._connections:
            self._send(request, engine_id, self._router.scores(time.monotonic()))
        else:
            self._stranded.setdefault(engine_id, {})[request] = None

    def _check_hope(self, pinned_engine: int | None) -> None:
        """Raises the EngineDeadError of those engines that could have served a request, when none does or will."""
        if pinned_engine is None:
            hope, error = bool(self._connections or self._outages), self.last_death
        else:
            hope, error = self._can_return(pinned_engine), self._deaths.get(pinned_engine)
        if not hope and error is not None:
            raise fresh(error)

    def _can_return(self, engine_id: int) -> bool:
        return engine_id in self._connections or engine_id in self._outages

    def _fail_hopeless(self) -> None:
        """End the requests that wait for an engine that will not come."""
        for engine_id in [engine_id for engine_id in self._stranded if not self._can_return(engine_id)]:
            for request in self._stranded.pop(engine_id):
                request.fail(self._deaths[engine_id])
        for request in self._admission.waiting:
            engine = request.pinned_engine
            if engine is not None and not self._can_return(engine):
                request.fail(self._deaths[engine])
        if not self._connections and not self._outages and self.last_death is not None:
            for request in list(self._requests.values()):
                request.fail(self.last_death)

    def _on_outage_over(self, error: EngineDeadError) -> None:
        self._deaths[error.engine_id] = self.last_death = error
        self._fail_hopeless()
        self._notify_loads()

    def call(self, method: str, args: Sequence[msgspec.Raw]) -> Awaitable[list[messages.EngineResult]]:
        """Run a registered method on every engine that is connected now; results in engine order.

        The calls are sent before this returns: so calls reach all engines in the order in which they are made.
        """
        if method in _MODES:
            self._mode = method
        return asyncio.gather(*(connection.call(method, args) for _, connection in sorted(self._connections.items())))

    # --- loads

    def loads(self) -> tuple[EngineLoad, ...]:
        """Every engine's load, in engine order."""
        return tuple(self._router.loads(time.monotonic()))

    def newest_load(self, engine_id: int) -> messages.Load | None:
        """What the engine said last of its load; `mine` is this client's."""
        return self._router.newest_load(engine_id)

    def report(self, engine_id: int, load: messages.Load) -> None:
        """An engine's counts, from wherever they came."""
        self._router.report(engine_id, load, time.monotonic())
        if self._load_waiters:
            self._notify_loads()
        if self._held or self._admission:
            self._dispatch_held()

    def watch_loads(self, watcher: LoadWatcher | None) -> None:
        """Tell `watcher` every change of an engine's load and everybody's share in it; None: no longer."""
        self._load_watcher = watcher
        for connection in self._connections.values():
            connection.connect(watch_loads=watcher is not None)

    async def wait_load_change(self) -> None:
        """Return when any engine's counts have changed."""
        waiter = self._loop.create_future()
        self._load_waiters.add(waiter)
        try:
            await waiter
        finally:
            self._load_waiters.discard(waiter)

    def _notify_loads(self) -> None:
        for waiter in self._load_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._load_waiters.clear()

    # --- requests

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended, of all clients as far as is known."""
        return max(self.num_live, sum(load.in_flight for load in self.loads()))

    def is_live(self, request_id: str) -> bool:
        return request_id in self._requests

    def allocate_wire_ids(self, count: int) -> int:
        """The first of `count` consecutive ids that were never used before."""
        first = self._next_wire_id
        self._next_wire_id += count
        return first

    def expected_output_tokens(self, max_tokens: int) -> int:
        """How many tokens a request will make, as far as those before it tell: most end long before max_tokens."""
        return min(max_tokens, round(self._mean_output_tokens))

    def check_room(self, pinned_engine: int | None, num_tokens: int = 1) -> None:
        """Raises OverloadedError when a request with so many prompt tokens would exceed the limits of what may wait."""
        admission = self._admission
        if not admission.is_limited:
            return
        if admission:
            self._dispatch_held()  # what became free in this very tick is for those who wait
        if pinned_engine is not None or not self._has_room():
            admission.check(pinned_engine, num_tokens)

    def _num_waiting_at(self, engine_id: int) -> int:
        """This client's requests that wait for a slot of this engine alone, or for it to return."""
        return self._router.excess(engine_id) + len(self._stranded.get(engine_id, ()))

    def submit(self, request: RequestStream) -> None:
        """Send the request now, or hold it until an engine has a free slot.

        Raises EngineDeadError when no engine is left, and what a routing policy of the user's raises.
        """
        self._check_hope(request.pinned_engine)
        self._place(request)
        self._register(request)
        if self._held:
            self._dispatch_held()

    def _place(self, request: RequestStream) -> None:
        """To an engine, or among those that wait for one."""
        if request.pinned_engine is not None:
            self._send_pinned(request)
        elif self._held or not self._dispatch(request):
            self._held.push(request)

    def submit_in_turn(self, request: RequestStream) -> asyncio.Future[None]:
        """Submit it when there is a place for it. The future is done then, or when the request has ended before.

        Raises EngineDeadError when no engine is left.
        """
        self._check_hope(request.pinned_engine)
        self._register(request)
        future = self._admission.wait(request)
        self._admit()
        return future

    def _admit(self) -> None:
        while (request := self._admission.next(self._has_room())) is not None:
            try:
                self._place(request)
            except Exception as error:  # of the user's routing policy
                request.fail(error)

    def refuse_waiting(self, error: Exception) -> None:
        """End those that wait for a place."""
        for request in self._admission.waiting:
            self.abort(request, error)

    def _has_room(self) -> bool:
        return not self._held and self._router.has_room(time.monotonic())

    def _register(self, request: RequestStream) -> None:
        self._requests[request.request_id] = request
        for choice in request.choices:
            self._choices[choice.wire_id] = choice

    def abort(self, request: RequestStream, error: Exception) -> None:
        """End the request with `error`, here at once and on its engine as soon as it hears."""
        self._abort_on_engine(request, [choice.wire_id for choice in request.open_choices])
        request.fail(error)

    def request_ended(self, request: RequestStream) -> None:
        """Forget a request that has all its tokens or failed. Called by its stream."""
        if request.error is None:
            num_tokens = request.num_tokens / len(request.choices)
            self._mean_output_tokens += _MEAN_OUTPUT_WEIGHT * (num_tokens - self._mean_output_tokens)
        self._requests.pop(request.request_id, None)
        self._held.discard(request)
        if request.pinned_engine is not None:
            self._stranded.get(request.pinned_engine, {}).pop(request, None)
        self._admission.leave(request)
        if self._admission:
            self._dispatch_held_soon()  # its place is free
        for choice in request.choices:
            self._choices.pop(choice.wire_id, None)

    async def wait_idle(self) -> None:
        """Return when no request is live."""
        while self._requests:
            await next(iter(self._requests.values())).wait_end()

    def _dispatch_held_soon(self) -> None:
        # Not at once: of many that are aborted together, those held back must not be sent only to be aborted, too.
        if (self._held or self._admission) and self._dispatching is None:
            self._dispatching = self._loop.call_soon(self._dispatch_held)

    def _dispatch_held(self) -> None:
        self._dispatching = None
        while self._held:
            request = self._held.first
            try:
                if not self._dispatch(request):
                    break
            except Exception as error:  # a policy of the user's failed: that is this request's end, not the others'
                request.fail(error)
            self._held.discard(request)
        if self._admission:
            self._admit()

    def _dispatch(self, request: RequestStream) -> bool:
        """Send the request to the engine that the router picks. Whether it found one with a free slot."""
        router = self._router
        wanted = RoutingRequest(
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=request.expected_output_tokens,
            session=request.session,
            home=router.home(request.session),
            cached_tokens=router.cached_tokens(request.prefix_hashes) if request.prefix_hashes else {},
        )
        decision = router.pick(wanted, time.monotonic())
        if decision is None:
            return False
        self._send(request, decision.engine_id, decision.scores)
        return True

    def _send(self, request: RequestStream, engine_id: int, scores: dict[int, float]) -> None:
        request.sent_at = time.monotonic()  # before the engine can have it
        for message in request.messages():
            self._connections[engine_id].send(message)
            self._router.sent(engine_id, message.n, message.n * message.weight)
        request.engine_id = engine_id
        request.scores = scores

    def _abort_on_engine(self, request: RequestStream, wire_ids: list[int]) -> None:
        connection = self._connections.get(request.engine_id) if request.engine_id is not None else None
        if connection is not None and wire_ids:
            self._router.ended(connection.engine_id, len(wire_ids), len(wire_ids) * request.weight)
            connection.send(messages.Abort(wire_ids))
            self._dispatch_held_soon()

    # --- what engines say

    def _on_message(self, connection: EngineConnection, message: messages.FromEngine | None) -> None:
        engine_id = connection.engine_id
        match message:
            case None:
                self._on_nonsense(engine_id)
            case messages.Outputs():
                token_ids = message.token_ids
                if token_ids and (max(token_ids) >= connection.vocab_size or min(token_ids) < 0):
                    self._end_impossible(connection, message)
                self._on_outputs(engine_id, message)
                self._on_load(engine_id, messages.LoadReport(message.load, message.by_client))
            case messages.LoadReport():
                self._on_load(engine_id, message)

    def _on_load(self, engine_id: int, report: messages.LoadReport) -> None:
        if self._load_watcher is not None and report.by_client is not None:
            self._load_watcher(engine_id, report)
        self.report(engine_id, report.load)

    def _on_nonsense(self, engine_id: int) -> None:
        """A message was dropped: it may have held tokens of any request aboard, which would go on without them."""
        self.num_malformed += 1
        for request in [request for request in self._requests.values() if request.engine_id == engine_id]:
            error = "a message of its engine made no sense, and may have held some of its tokens"
            self.abort(request, EngineError(f"request {request.request_id!r}: {error}", engine_id=engine_id))

    def _end_impossible(self, connection: EngineConnection, outputs: messages.Outputs) -> None:
        """End the requests that were sent a token which the model does not have."""
        self.num_malformed += 1
        for wire_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
            choice = self._choices.get(wire_id)
            if choice is not None and not 0 <= token_id < connection.vocab_size:
                error = f"its engine sent token id {token_id}; the model has ids 0 to {connection.vocab_size - 1}"
                request, engine_id = choice.request, connection.engine_id
                self.abort(request, EngineError(f"request {request.request_id!r}: {error}", engine_id=engine_id))

    def _on_outputs(self, engine_id: int, outputs: messages.Outputs) -> None:
        # Whoever is woken here runs when all of the message has been taken in.
        if outputs.logprobs or outputs.prompt_logprobs:
            self._on_logprobs(outputs)
        now = time.monotonic()
        find = self._choices.get
        to_check: list[ChoiceStream] = []
        for wire_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
            choice = find(wire_id)
            if choice is None:
                continue  # it ended here before its engine knew
            if not choice.token_ids:
                self._on_first_token(engine_id, choice.request, now)
            if choice.push(token_id, now):
                to_check.append(choice)
        for finished in outputs.finished:
            self._on_finished(engine_id, finished)
        for choice in to_check:
            if choice.check_stop_strings():
                self._choices.pop(choice.wire_id, None)
                self._abort_on_engine(choice.request, [choice.wire_id])

    def _on_first_token(self, engine_id: int, request: RequestStream, now: float) -> None:
        if request.first_token_at is None:
            request.first_token_at = now
            self._router.computed(engine_id, request.prefix_hashes)
            request.prefix_hashes = ()

    def _on_logprobs(self, outputs: messages.Outputs) -> None:
        for index, logprobs in outputs.logprobs:
            choice = self._choices.get(outputs.request_ids[index])
            if choice is not None:
                choice.logprobs.append(logprobs)
        for request_id, prompt_logprobs in outputs.prompt_logprobs:
            choice = self._choices.get(request_id)
            if choice is not None and choice.index == 0:
                choice.request.prompt_logprobs.extend(prompt_logprobs)

    def _on_finished(self, engine_id: int, finished: messages.Finished) -> None:
        choice = self._choices.get(finished.request_id)
        if choice is None or choice.request.engine_id != engine_id:
            return
        del self._choices[finished.request_id]
        request = choice.request
        self._router.ended(engine_id, 1, request.weight)
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

    def close(self, error: Exception) -> None:
        """End every request with `error`, tell the engines that this client leaves, and close the sockets."""
        for request in list(self._requests.values()):
            self.abort(request, error)
        for connection in self._connections.values():
            connection.leave()
            connection.close(error)
        self._connections.clear()
        self._outages.close()
        self._notify_loads()
