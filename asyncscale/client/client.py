"""The public client: its life, and the calls people make."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import weakref
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Literal, cast

import msgspec
import zmq

from asyncscale import messages, transport
from asyncscale.address import parse, shown
from asyncscale.checkpoint.model_config import ModelConfig
from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.engines import AttachedEngines, Engines, OwnedEngines
from asyncscale.client.exceptions import fresh
from asyncscale.client.forgotten import end_now, end_when_forgotten
from asyncscale.client.generation import Generation
from asyncscale.client.options import Limits, engine_config, find_model, routing_policy
from asyncscale.client.placement import place_engines
from asyncscale.client.policies import EngineLoad, Policy
from asyncscale.client.preparation import Preparation, Prompt, RequestOptions
from asyncscale.client.progress import StartProgress
from asyncscale.client.roster import EngineHealth
from asyncscale.client.sizing import auto_num_engines
from asyncscale.client.state import State, wrong_state
from asyncscale.client.submission import Submission
from asyncscale.client.supervisor import Launch
from asyncscale.config import CheckpointFiles, ModelSource, SimulatedModel
from asyncscale.cpus import usable_cpus
from asyncscale.errors import (
    ClientClosedError,
    ClientStateError,
    EngineDeadError,
    EngineError,
)
from asyncscale.memory import available_memory
from asyncscale.params import SamplingParams
from asyncscale.tokenization.codec import TextCodec
from asyncscale.tokenization.loading import load_codec

logger = logging.getLogger(__name__)


class AsyncScaleClient:
    """Owns engine processes that run a language model, and streams what they generate::

        async with AsyncScaleClient("smollm2-135m-instruct", num_engines=2) as client:
            async for token in client.generate("The capital of France is", max_tokens=32):
                print(token, end="", flush=True)

    model: a built-in name, a local Hugging Face folder or GGUF file, a Hugging Face hub id, or a `SimulatedModel`.
    num_engines: each is a process that computes the whole model; "auto" is one per usable core, at most four, and no
    more than there is memory for.
    routing: "least-loaded", "least-tokens", "round-robin", or a function (loads, request) -> one of the loads.
    start_timeout: seconds until all engines must be ready. An engine that dies is started again, and its requests go on
    at another one. restart_timeout: seconds for which they wait for it while there is no other.
    max_restarts: of one engine in a row, after lives hardly longer than its start, and it stays dead.
    hang_timeout: seconds without
    progress after which an engine that neither computes nor waits for requests is killed and started again (a stopped
    one after a tenth, one that uses CPU after ten times as long); None: never.
    max_queued_requests, max_queued_tokens: how many requests of this client, and tokens of their prompts, may wait here
    while every engine is full. Exact, and of this client alone: each has limits of its own. Beyond them `generate`
    raises OverloadedError, and `submit` waits. None: no limit. Requests for one engine (`engine=`) wait there:
    max_queued_requests of them at each. What an engine's death sends back was accepted already, and is never refused.
    host: None lets clients of this host and user attach, over sockets in a private folder. An address or a name of this
    machine ("127.0.0.1", "10.0.0.1", "::1"; "0.0.0.0" is all its interfaces) lets others attach over tcp, encrypted:
    those who have `address`, which then is a secret.
    progress: show bars on stderr; None does when it is a terminal.
    **options: the fields of `EngineConfig`, such as max_model_len, max_num_seqs, dtype.

    Raises TypeError and ValueError for wrong options here; `start` raises ModelLoadError and EngineStartError.
    It belongs to the event loop that it is started on.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | SimulatedModel = "smollm2-135m-instruct",
        *,
        num_engines: int | Literal["auto"] = "auto",
        routing: str | Policy = "least-loaded",
        start_timeout: float = 300.0,
        restart_timeout: float = 60.0,
        max_restarts: int = 8,
        hang_timeout: float | None = 10.0,
        max_queued_requests: int | None = None,
        max_queued_tokens: int | None = None,
        host: str | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> None:
        if num_engines != "auto" and (
            not isinstance(num_engines, int) or isinstance(num_engines, bool) or num_engines < 1
        ):
            raise ValueError(f'num_engines must be "auto" or an integer of at least 1, got {num_engines!r}')
        if not isinstance(model, str | os.PathLike | SimulatedModel):
            raise TypeError(f"model must be a name, a path or a SimulatedModel, got {type(model).__name__}")
        if host is not None and not isinstance(host, str):
            raise TypeError(f"host must be a string or None, got {type(host).__name__}")
        self._model = model
        self._num_engines = num_engines
        self._config = engine_config(options)
        self._start_timeout = start_timeout
        self._max_restarts = max_restarts
        self._hang_timeout = hang_timeout
        self._host = host
        self._progress = progress
        self._prepare(routing, Limits(restart_timeout, max_queued_requests, max_queued_tokens), None)

    @classmethod
    def attach(
        cls,
        address: str,
        *,
        routing: str | Policy = "least-loaded",
        restart_timeout: float = 60.0,
        max_queued_requests: int | None = None,
        max_queued_tokens: int | None = None,
    ) -> AsyncScaleClient:
        """A client of engines that another process owns: `address` is that client's `address`.

        ::

            async with AsyncScaleClient.attach(address) as client: ...

        Closing it leaves the engines running. From another host (see `host`), a model that is a path or of the hub must
        be at the same path there. Raises ValueError for what can be no address.
        """
        parse(address)
        client = cls.__new__(cls)
        client._prepare(routing, Limits(restart_timeout, max_queued_requests, max_queued_tokens), address)
        return client

    def _prepare(self, routing: str | Policy, limits: Limits, attach_to: str | None) -> None:
        self._policy = routing_policy(routing)
        self._limits = limits
        self._attach_to = attach_to
        self._state = State.NEW
        self._loop: asyncio.AbstractEventLoop | None = None
        self._identity = b"c" + os.urandom(16)  # ZeroMQ keeps identities that begin with a zero byte for itself
        self._owner_pid = 0  # of the process that started it, unlike forks of that
        self._starter: asyncio.Task[Any] | None = None  # who awaits `start`, until it is over
        self._closed_while_starting = False
        self._closing: asyncio.Task[None] | None = None
        self._may_drain = True
        self._drain_limit: asyncio.Timeout | None = None  # while it drains
        self._cleanup = AsyncExitStack()  # in reverse: requests and connections, engines, sockets' context
        self._context: zmq.Context[zmq.Socket[bytes]]
        self._engines: Engines
        self._dispatcher: Dispatcher
        self._submission: Submission
        self._finalizer: weakref.finalize[..., AsyncScaleClient] | None = None  # while it runs

    # --- life

    async def start(self) -> AsyncScaleClient:
        """Fetch the model if need be, start the engines (or attach to them), and return when requests can be served."""
        if self._state is not State.NEW:
            raise wrong_state(self._state, "start")
        self._state = State.STARTING
        self._loop = asyncio.get_running_loop()
        self._owner_pid = os.getpid()
        self._context = transport.make_context()
        self._cleanup.callback(self._context.destroy, linger=0)
        self._dispatcher = Dispatcher(self._context, self._identity, self._policy, self._limits)
        self._starter = starter = cast("asyncio.Task[Any]", asyncio.current_task())
        num_cancels = starter.cancelling()
        try:
            await (self._start_owned() if self._attach_to is None else self._start_attached(self._attach_to))
        except BaseException:
            if self._closing is None:
                self._begin_closing(self._shut_down())
            await self._wait_closed()
            if self._closed_while_starting and starter.uncancel() <= num_cancels:
                raise ClientClosedError("the client was closed while it started") from None
            raise
        finally:
            self._starter = None
        self._state = State.RUNNING
        self._finalizer = end_when_forgotten(self, self._loop, self._cleanup, self._engines, self._context)
        return self

    async def _start_owned(self) -> None:
        started = time.monotonic()
        with StartProgress(self._progress) as progress:
            source: ModelSource
            architecture: ModelConfig | None = None
            if isinstance(self._model, SimulatedModel):
                source = self._model
            else:
                source, architecture = await asyncio.to_thread(find_model, self._model, progress.on_fetch)
            cpus, num_engines = usable_cpus(), self._num_engines
            if num_engines == "auto":
                num_engines = auto_num_engines(cpus.num_cores, self._config, architecture, available_memory())
            progress.num_engines = num_engines
            tcp = None if self._host is None else await asyncio.to_thread(transport.tcp_binding, self._host)
            launch = Launch(
                source,
                self._config,
                place_engines(cpus, num_engines, self._config.threads_per_engine, self._config.pin_engines),
                self._start_timeout,
                progress.on_loading,
                self._max_restarts,
                self._hang_timeout,
                tcp,
            )
            self._use(OwnedEngines(self._context, launch, self._dispatcher))
            try:
                async with asyncio.TaskGroup() as group:  # the tokenizer loads while the engines do
                    codec = group.create_task(asyncio.to_thread(load_codec, source))
                    group.create_task(self._engines.start())
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            await self._connect(codec.result())
        facts = self._submission.facts
        logger.info(
            "%d engines ready in %.1f s: %s, %s, context %d tokens, KV cache %d blocks of %d tokens each; attach at %s",
            num_engines,
            time.monotonic() - started,
            source.name if isinstance(source, CheckpointFiles) else "simulated model",
            facts.dtype,
            facts.max_model_len,
            facts.num_blocks,
            facts.block_size,
            shown(self._engines.address),
        )

    async def _start_attached(self, address: str) -> None:
        self._use(AttachedEngines(self._context, self._identity, address, self._dispatcher))
        await self._engines.start()
        await self._connect(await asyncio.to_thread(load_codec, self._engines.model))
        logger.debug("attached to %d engines at %s", len(self._engines.roster.members), shown(address))

    def _use(self, engines: Engines) -> None:
        self._engines = engines
        self._cleanup.push_async_callback(engines.stop)
        self._cleanup.callback(self._dispatcher.close, ClientClosedError("the client was closed"))

    async def _connect(self, codec: TextCodec) -> None:
        await self._dispatcher.wait_engine()  # one that was ready may have died since
        facts = self._engines.roster.members[0].facts
        self._submission = Submission(Preparation(codec, facts), self._dispatcher)

    async def close(self, drain: bool = True, timeout: float | None = 60.0) -> None:
        """End the client and, if it owns them, its engines.

        drain: let requests finish first (at most `timeout` seconds), while new ones are refused; those of attached
        clients, too, if it owns the engines. Otherwise, and after the timeout, they end with ClientClosedError.
        Idempotent, and safe to call several times at once: the first call decides, but one without drain ends a drain,
        as cancelling the first does; the closing goes on. It does nothing in a fork of the process that the client
        belongs to. When the client's event loop is closed, it can be closed from any other, without drain.
        """
        if self._state is State.NEW:
            self._state = State.CLOSED
            return
        if self._state is State.CLOSED or os.getpid() != self._owner_pid:
            return
        if self._loop is not None and self._loop.is_closed():
            await asyncio.to_thread(self._abandon)
            return
        self._check_loop()
        if self._closing is None:
            if self._starter is not None:
                drain = False
                self._closed_while_starting = True
                self._starter.cancel()
            self._begin_closing(self._close(drain, timeout))
            try:
                await self._wait_closed()
            except asyncio.CancelledError:
                self._stop_draining()
                raise
        else:
            if not drain:
                self._stop_draining()
            await self._wait_closed()

    def _begin_closing(self, closing: Coroutine[Any, Any, None]) -> None:
        self._state = State.CLOSING
        self._closing = asyncio.ensure_future(closing)
        self._closing.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _stop_draining(self) -> None:
        self._may_drain = False  # if it has not begun to
        if self._drain_limit is not None and not self._drain_limit.expired():
            self._drain_limit.reschedule(0.0)

    async def _wait_closed(self) -> None:
        """Return when the client is closed; it goes on being closed when who waits here is cancelled."""
        if self._closing is None:
            return
        await asyncio.wait([self._closing])
        error = None if self._closing.cancelled() else self._closing.exception()
        if isinstance(error, Exception):  # else a Ctrl-C that hit the closing: it has been raised already, by the loop
            raise error

    async def _close(self, drain: bool, timeout: float | None) -> None:
        try:
            if drain and self._may_drain:
                self._dispatcher.refuse_waiting(ClientClosedError("the client was closed"))
                async with asyncio.timeout(timeout) as self._drain_limit:
                    await self._drain()
        except TimeoutError:
            if self._drain_limit is None or self._drain_limit.when() == 0.0:
                return  # somebody does not want to wait for it
            logger.warning("closing: %d requests did not finish within %g s", self._dispatcher.num_in_flight, timeout)
        finally:
            self._drain_limit = None
            await self._shut_down()

    async def _drain(self) -> None:
        """Wait for this client's requests and, if its engines end with it, for those of all others."""
        await self._dispatcher.wait_idle()
        if self._attach_to is not None:
            return
        await self._dispatcher.call("drain", [])
        while any(load.running or load.waiting for load in self._dispatcher.loads()):
            await self._dispatcher.wait_load_change()

    async def _shut_down(self) -> None:
        try:
            await self._cleanup.aclose()
        finally:
            self._set_closed()

    def _abandon(self) -> None:
        if self._finalizer is not None:
            end_now(self._engines, self._context)
        self._set_closed()

    def _set_closed(self) -> None:
        self._state = State.CLOSED
        if self._finalizer is not None:
            self._finalizer.detach()

    async def __aenter__(self) -> AsyncScaleClient:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._closing is not None:
            await self._wait_closed()  # another task closes it, and perhaps lets requests finish
        else:
            await self.close(drain=False)

    # --- requests

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        /,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        engine: int | None = None,
        session: str | None = None,
        **sampling: Any,
    ) -> Generation:
        """Start a request and return at once: iterate over the result for tokens, or await it for all of them.

        ::

            async for token in client.generate("Once upon a time", temperature=0.8): ...
            completion = await client.generate([1, 4093, 198], max_tokens=16)

        prompt: text, or token ids. params, **sampling: see SamplingParams; keywords override params.
        request_id: a label of your own, not used by another live request. priority: lower runs first.
        timeout: seconds until it is aborted with RequestTimeoutError. engine: send it to this engine and no other.
        session: requests of the same session prefer the same engine, whose prefix cache knows their past.
        Raises InvalidRequestError, OverloadedError, ClientStateError, EngineDeadError.
        """
        self._check_usable()
        options = RequestOptions(request_id, priority, timeout, engine, session)
        return self._submission.submit(lambda: prompt, SamplingParams.of(params, sampling), options, self)

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        /,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        engine: int | None = None,
        session: str | None = None,
        **sampling: Any,
    ) -> Generation:
        """Like `generate`, but where that raises OverloadedError, wait for a place in the queue::

            generation = await client.submit("Once upon a time", timeout=60)
            async for token in generation: ...

        Who waits goes in turn: better priorities first, then who came first; `generate` overtakes none of them.
        timeout: counts from this call on. Raises what `generate` raises except OverloadedError, RequestTimeoutError,
        and ClientClosedError when the client is closed meanwhile.
        """
        self._check_usable()
        options = RequestOptions(request_id, priority, timeout, engine, session)
        return await self._submission.submit_in_turn(lambda: prompt, SamplingParams.of(params, sampling), options, self)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        /,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        engine: int | None = None,
        session: str | None = None,
        **sampling: Any,
    ) -> Generation:
        """Like `generate`, for a conversation, which the model's own chat template turns into a prompt.

        ::

            completion = await client.chat([{"role": "user", "content": "What is the capital of France?"}])

        chat_template_kwargs: further variables of the template. Raises InvalidRequestError, also for a model without
        one.
        """
        self._check_usable()

        def encode() -> list[int]:
            return self._submission.codec.encode_chat(
                messages, add_generation_prompt=add_generation_prompt, **(chat_template_kwargs or {})
            )

        options = RequestOptions(request_id, priority, timeout, engine, session)
        return self._submission.submit(encode, SamplingParams.of(params, sampling), options, self)

    # --- engines

    @property
    def address(self) -> str:
        """What `AsyncScaleClient.attach` takes, in this process or another.

        With `host`, it holds the key that lets in whoever has it, from wherever it is reached: then it is a secret.
        """
        if self._state is not State.RUNNING:
            raise wrong_state(self._state, "use")
        return self._engines.address  # also from other loops, threads and forks: to attach there

    def engine_loads(self) -> tuple[EngineLoad, ...]:
        """The newest counts of every engine, and their age. Asks nobody."""
        self._check_usable()
        return self._dispatcher.loads()

    def health(self) -> tuple[EngineHealth, ...]:
        """How every engine is: state, age of its last step, restarts, last error. Asks nobody.

        ::

            [engine.engine_id for engine in client.health() if engine.state != "ready"]
        """
        self._check_usable()
        return self._engines.roster.health()

    @property
    def num_malformed(self) -> int:
        """How many messages were dropped because they made no sense: of engines or owner, or, in an owner, of attached
        clients. Engines count what they drop themselves: see ``collective_rpc("process_info")``.
        """
        self._check_usable()
        return self._engines.num_malformed + self._dispatcher.num_malformed

    async def watch_loads(self) -> AsyncIterator[tuple[EngineLoad, ...]]:
        """The engines' loads, now and whenever they change::

            async for loads in client.watch_loads(): ...

        Ends when the client is closed.
        """
        while self._state is State.RUNNING:
            yield self.engine_loads()
            await self._dispatcher.wait_load_change()

    async def collective_rpc(self, method: str, /, *args: object, timeout: float | None = 60.0) -> list[Any]:
        """Run a registered engine method exactly once on every engine; results in engine order.

        ::

            await client.collective_rpc("kv_cache_stats")

        Methods: kv_cache_stats, reset_prefix_cache, profile(is_start), pause, drain, resume, process_info,
        speculation_stats.
        Arguments and results are plain values (numbers, strings, lists, dicts). Calls of all clients reach all engines
        in one order. timeout: seconds to wait for the results; what was sent runs all the same.
        Raises EngineError when an engine refuses or fails, EngineDeadError when one dies before it answers,
        TimeoutError.
        """
        self._check_usable()
        raw = [msgspec.Raw(messages.encoder.encode(argument)) for argument in args]
        if len(args) > messages.MAX_CALL_ARGS or sum(map(len, map(bytes, raw))) > messages.MAX_CALL_BYTES:
            raise ValueError(
                f"a call may have {messages.MAX_CALL_ARGS} arguments of {messages.MAX_CALL_BYTES} bytes, all together"
            )
        async with asyncio.timeout(timeout):
            results = await self._engines.call(method, raw)
        if not results and self._dispatcher.last_death is not None:
            raise fresh(self._dispatcher.last_death)
        return [_value(result) for result in results]

    # --- use

    def _check_usable(self) -> None:
        if self._state is not State.RUNNING:
            raise wrong_state(self._state, "use")
        self._check_loop()

    def _check_loop(self) -> None:
        if asyncio._get_running_loop() is not self._loop:
            is_fork = os.getpid() != self._owner_pid
            where = "by the process that this one is a fork of" if is_fork else "on another event loop"
            raise ClientStateError(
                f"this client was started {where}. "
                "Use it where it was started, or make one of its own here: AsyncScaleClient.attach(client.address)"
            )

    def __repr__(self) -> str:
        what = (
            f"attached to {shown(self._attach_to)!r}"
            if self._attach_to
            else f"{self._model!r}, num_engines={self._num_engines}"
        )
        return f"<AsyncScaleClient {what}, {self._state.value}>"


def _value(result: messages.EngineResult) -> Any:
    if result.error is None:
        try:
            return msgspec.msgpack.decode(result.value)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise EngineError("the engine's result cannot be read", engine_id=result.engine_id) from None
    kind = EngineDeadError if result.died else EngineError
    raise kind(result.error, engine_id=result.engine_id)
