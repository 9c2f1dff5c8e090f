"""Which request goes where and when: to the engine that the router picks, or among those that wait for a free slot."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import zmq

from asyncscale import messages
from asyncscale.client.admission import Admission
from asyncscale.client.connection import EngineConnection
from asyncscale.client.fleet import Fleet
from asyncscale.client.hold_queue import HoldQueue
from asyncscale.client.intake import Intake
from asyncscale.client.live_requests import LiveRequests
from asyncscale.client.options import Limits
from asyncscale.client.policies import EngineLoad, Policy, RoutingRequest
from asyncscale.client.router import Router
from asyncscale.client.stream import RequestStream
from asyncscale.errors import EngineDeadError, OverloadedError
from asyncscale.metrics.request_counters import RequestCounters

logger = logging.getLogger(__name__)

# The running mean of how many tokens requests make: where it begins, and how much the newest request counts.
_FIRST_MEAN_OUTPUT_TOKENS = 256.0
_MEAN_OUTPUT_WEIGHT = 0.05

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
        self._load_watcher: LoadWatcher | None = None
        self._loop = asyncio.get_running_loop()
        self._fleet = Fleet(
            context, identity, limits.restart_timeout, self._on_message, self._on_loss, self._on_hopeless
        )
        self._router = Router(policy, first_turn=int.from_bytes(identity[-2:]))
        self._live = LiveRequests()
        self.counters = RequestCounters(identity)
        self._intake = Intake(self._live, self._router, self, self.counters)
        self._held = HoldQueue()
        self._admission = Admission(
            self._held, limits.max_queued_requests, limits.max_queued_tokens, self._num_waiting_at
        )
        self.counters.num_held = lambda: len(self._held) + len(self._admission)
        self._dispatching: asyncio.Handle | None = None
        self._mean_output_tokens = _FIRST_MEAN_OUTPUT_TOKENS
        self._load_waiters: set[asyncio.Future[None]] = set()
        self._stranded: dict[int, dict[RequestStream, None]] = {}  # pinned to an engine that will return, in order
        self.on_request_sent: Callable[[], None] | None = None  # where engines may have to be woken for it
        self.on_unreachable: Callable[[messages.Member], None] = lambda member: None  # it is dead, and nobody said so

    # --- engines

    @property
    def engine_ids(self) -> tuple[int, ...]:
        """All engines, also those that died, in order."""
        return self._fleet.engine_ids

    @property
    def connections(self) -> tuple[EngineConnection, ...]:
        """To the engines that take requests."""
        return tuple(self._fleet[engine_id] for engine_id in self._fleet)

    @property
    def last_death(self) -> EngineDeadError | None:
        return self._fleet.last_death

    @property
    def num_malformed(self) -> int:
        """Messages of engines that were dropped because they made no sense."""
        return self._intake.num_malformed

    def join(self, member: messages.Member) -> None:
        """An engine takes requests from now on. Does nothing when it does already."""
        engine_id = member.engine_id
        if engine_id in self._fleet:
            return
        self._fleet.join(member)
        self._router.join(engine_id, member.facts.max_num_seqs)
        self._router.report(engine_id, member.load, time.monotonic())
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
        connection = self._fleet.leave(error, returns=returns)
        if connection is not None:
            self._router.leave(error.engine_id)
            last_step_began = connection.last_step_began
            aboard = self._live.aboard(error.engine_id)
            logger.info(
                "engine %d had %d requests of this client, which go on elsewhere",
                error.engine_id,
                len(aboard),
                extra={"engine_id": error.engine_id},
            )
            for request in aboard:
                self._rescue(request, error, was_aboard=request.sent_at < last_step_began)
        self._fail_hopeless()
        self._dispatch_held()
        self._notify_loads()

    def _on_loss(self, connection: EngineConnection) -> None:
        """An engine cannot be reached any more. When it is dead, whoever knows that says `leave`; else it has dropped
        what this client had there, and what was left undone is done anew, there or elsewhere."""
        engine_id = connection.engine_id
        connection.drain()
        if connection.is_for_nobody:
            self.on_unreachable(connection.member)
            return
        self._fleet.reconnect(connection)
        for request in self._live.aboard(engine_id):
            num_open = len(request.open_choices)
            self._router.ended(engine_id, num_open, num_open * request.weight)
            self._move(request)
        self._dispatch_held()

    async def wait_engine(self) -> None:
        """Return when an engine takes requests. Raises EngineDeadError when none will."""
        while not self._fleet:
            self._fleet.check_hope(None)
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
        self.counters[request.engine_id].moved()
        request.num_moves += 1
        if request.span is not None:
            request.span.moved(request.engine_id)
        request.engine_id = None
        self._live.renumber(request)
        if request.pinned_engine is None:
            self._held.push(request)
        else:
            self._send_pinned(request)

    def _send_pinned(self, request: RequestStream) -> None:
        """To its engine, now or when that is back."""
        engine_id = request.pinned_engine
        if engine_id is None or request.done:
            return
        if engine_id in self._fleet:
            self._send(request, engine_id, self._router.scores(time.monotonic()))
        else:
            self._stranded.setdefault(engine_id, {})[request] = None

    def _on_hopeless(self) -> None:
        self._fail_hopeless()
        self._notify_loads()

    def _fail_hopeless(self) -> None:
        """End the requests that wait for an engine that will not come."""
        fleet = self._fleet
        for engine_id in [engine_id for engine_id in self._stranded if not fleet.can_return(engine_id)]:
            for request in self._stranded.pop(engine_id):
                request.fail(fleet.deaths[engine_id])
        for request in self._admission.waiting:
            engine = request.pinned_engine
            if engine is not None and not fleet.can_return(engine):
                request.fail(fleet.deaths[engine])
        if fleet.is_hopeless and fleet.last_death is not None:
            for request in self._live:
                request.fail(fleet.last_death)

    def call(self, method: str, args: Sequence[msgspec.Raw]) -> Awaitable[list[messages.EngineResult]]:
        """Run a registered method on every engine; see `Fleet.call`."""
        return self._fleet.call(method, args)

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
        self._fleet.watch_loads(watcher is not None)

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
        return len(self._live)

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended, of all clients as far as is known."""
        return max(self.num_live, sum(load.in_flight for load in self.loads()))

    @property
    def num_held(self) -> int:
        """Requests that wait here for a free slot, or for the engine that they are for."""
        return len(self._held) + sum(map(len, self._stranded.values()))

    def is_live(self, request_id: str) -> bool:
        return request_id in self._live

    def allocate_wire_ids(self, count: int) -> int:
        """The first of `count` consecutive ids that were never used before."""
        return self._live.allocate_wire_ids(count)

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
            try:
                admission.check(pinned_engine, num_tokens)
            except OverloadedError:
                self.counters.rejected()
                raise

    def _num_waiting_at(self, engine_id: int) -> int:
        """This client's requests that wait for a slot of this engine alone, or for it to return."""
        return self._router.excess(engine_id) + len(self._stranded.get(engine_id, ()))

    def submit(self, request: RequestStream) -> None:
        """Send the request now, or hold it until an engine has a free slot.

        Raises EngineDeadError when no engine is left, and what a routing policy of the user's raises.
        """
        self._fleet.check_hope(request.pinned_engine)
        self._place(request)
        self._live.add(request)
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
        self._fleet.check_hope(request.pinned_engine)
        self._live.add(request)
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

    def abort(self, request: RequestStream, error: BaseException) -> None:
        """End the request with `error`, here at once and on its engine as soon as it hears."""
        self.abort_on_engine(request, [choice.wire_id for choice in request.open_choices])
        request.fail(error)

    def request_ended(self, request: RequestStream) -> None:
        """Forget a request that has all its tokens or failed. Called by its stream."""
        self.counters.ended(request, time.monotonic())
        if request.error is None:
            num_tokens = request.num_tokens / len(request.choices)
            self._mean_output_tokens += _MEAN_OUTPUT_WEIGHT * (num_tokens - self._mean_output_tokens)
        self._live.discard(request)
        self._held.discard(request)
        if request.pinned_engine is not None:
            self._stranded.get(request.pinned_engine, {}).pop(request, None)
        self._admission.leave(request)
        if self._admission:
            self._dispatch_held_soon()  # its place is free

    async def wait_idle(self) -> None:
        """Return when no request is live."""
        while self._live:
            await next(iter(self._live)).wait_end()

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
            self._fleet[engine_id].send(message)
            self._router.sent(engine_id, message.n, message.n * message.weight)
        if self.on_request_sent is not None:
            self.on_request_sent()
        request.engine_id = engine_id
        request.scores = scores
        if request.first_token_at is None:
            request.queued_at = request.sent_at
        if request.num_moves == 0:
            self.counters[engine_id].held(request.sent_at - request.arrival)

    def abort_on_engine(self, request: RequestStream, wire_ids: list[int]) -> None:
        """Have the engine end these of its choices."""
        engine_id = request.engine_id
        if engine_id is not None and engine_id in self._fleet and wire_ids:
            self._router.ended(engine_id, len(wire_ids), len(wire_ids) * request.weight)
            self._fleet[engine_id].send(messages.Abort(wire_ids))
            self._dispatch_held_soon()

    # --- what engines say

    def _on_message(self, connection: EngineConnection, message: messages.FromEngine | None) -> None:
        engine_id = connection.engine_id
        match message:
            case None:
                self._intake.on_nonsense(engine_id)
            case messages.Outputs():
                self._intake.on_outputs(engine_id, connection.vocab_size, message)
                self._on_load(engine_id, messages.LoadReport(message.load, message.by_client))
            case messages.LoadReport():
                self._on_load(engine_id, message)

    def _on_load(self, engine_id: int, report: messages.LoadReport) -> None:
        if self._load_watcher is not None and report.by_client is not None:
            self._load_watcher(engine_id, report)
        self.report(engine_id, report.load)

    def abort_all(self, error: BaseException) -> None:
        """End every request with `error`."""
        for request in self._live:
            self.abort(request, error)

    def close(self, error: Exception) -> None:
        """End every request with `error`, tell the engines that this client leaves, and close the sockets."""
        self.abort_all(error)
        self._fleet.close(error)
        self._notify_loads()
