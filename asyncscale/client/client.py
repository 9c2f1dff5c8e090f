"""The public client: its life, and the calls people make."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

import msgspec
import zmq

from asyncscale import messages, transport
from asyncscale.address import parse, shown
from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.engines import AttachedEngines, Engines, OwnedEngines
from asyncscale.client.exceptions import fresh
from asyncscale.client.fleet_plan import FleetPlan
from asyncscale.client.forgotten import end_now, end_when_forgotten
from asyncscale.client.generation import Generation
from asyncscale.client.life import Life
from asyncscale.client.misuse import caller, client_stays_here
from asyncscale.client.options import Limits, engine_config, routing_policy
from asyncscale.client.policies import EngineLoad, Policy
from asyncscale.client.preparation import Preparation, Prompt, RequestOptions
from asyncscale.client.progress import StartProgress
from asyncscale.client.roster import EngineHealth
from asyncscale.client.state import State, wrong_state
from asyncscale.client.submission import Submission
from asyncscale.client.tracing import Tracing
from asyncscale.client.weight_updates import update_weights
from asyncscale.config import CheckpointFiles, ModelSource, SimulatedModel
from asyncscale.errors import ClientClosedError, EngineDeadError, EngineError
from asyncscale.messages import EngineFacts
from asyncscale.metrics.snapshot import Counts, Metrics
from asyncscale.params import SamplingParams
from asyncscale.tokenization.codec import TextCodec
from asyncscale.tokenization.loading import load_codec

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from asyncscale.notebook.dashboard import Dashboard

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
    progress: show bars, on stderr or, in a notebook, as widgets; None does there, and when stderr is a terminal.
    tracer_provider: of OpenTelemetry, for a span of each request, whose parent is the span that is current in the call;
    None: the global one, once the program has configured it.
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
        tracer_provider: TracerProvider | None = None,
        **options: Any,
    ) -> None:
        config = engine_config(options, AsyncScaleClient.__init__.__kwdefaults__ or ())
        self._plan = FleetPlan(model, num_engines, config, start_timeout, max_restarts, hang_timeout, host)
        self._progress = progress
        limits = Limits(restart_timeout, max_queued_requests, max_queued_tokens)
        self._prepare(routing, limits, Tracing(tracer_provider), None)

    @classmethod
    def attach(
        cls,
        address: str,
        *,
        routing: str | Policy = "least-loaded",
        restart_timeout: float = 60.0,
        max_queued_requests: int | None = None,
        max_queued_tokens: int | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> Self:
        """A client of engines that another process owns: `address` is that client's `address`.

        ::

            async with AsyncScaleClient.attach(address) as client: ...

        Closing it leaves the engines running. From another host (see `host`), a model that is a path or of the hub must
        be at the same path there. Raises ValueError for what can be no address.
        """
        parse(address)
        client = cls.__new__(cls)
        limits = Limits(restart_timeout, max_queued_requests, max_queued_tokens)
        client._prepare(routing, limits, Tracing(tracer_provider), address)
        return client

    def _prepare(self, routing: str | Policy, limits: Limits, tracing: Tracing, attach_to: str | None) -> None:
        self._policy = routing_policy(routing)
        self._tracing = tracing
        self._limits = limits
        self._attach_to = attach_to
        self._identity = b"c" + os.urandom(16)  # ZeroMQ keeps identities that begin with a zero byte for itself
        self._life = Life()
        self._made_at = caller()
        self._context: zmq.Context[zmq.Socket[bytes]]
        self._engines: Engines
        self._dispatcher: Dispatcher
        self._submission: Submission
        # Of what the same cell of a notebook made before.
        self._closings: list[concurrent.futures.Future[None]] = []
        if "ipykernel" in sys.modules:
            from asyncscale.notebook.interrupts import wake_at_signals
            from asyncscale.notebook.replacement import close_replaced

            wake_at_signals()
            self._closings = close_replaced(self)

    # --- life

    async def start(self) -> AsyncScaleClient:
        """Fetch the model if need be, start the engines (or attach to them), and return when requests can be served."""
        await self._life.start(self._begin)
        loop, cleanup = asyncio.get_running_loop(), self._life.cleanup
        finalizer = end_when_forgotten(self, loop, cleanup, self._engines, self._context, self._made_at)
        self._life.run(finalizer, partial(end_now, self._engines, self._context))
        return self

    async def _begin(self) -> None:
        if self._closings:
            from asyncscale.notebook.replacement import wait_closed

            await wait_closed(self._closings)
        self._context = transport.make_context()
        self._life.cleanup.callback(self._context.destroy, linger=0)
        self._dispatcher = Dispatcher(self._context, self._identity, self._policy, self._limits)
        await (self._start_owned() if self._attach_to is None else self._start_attached(self._attach_to))

    async def _start_owned(self) -> None:
        started = time.monotonic()
        with StartProgress(self._progress) as progress:
            launch = await self._plan.launch(progress)
            self._use(OwnedEngines(self._context, launch, self._dispatcher))
            try:
                async with asyncio.TaskGroup() as group:  # the tokenizer loads while the engines do
                    codec = group.create_task(self._load_codec(launch.model))
                    group.create_task(self._engines.start())
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            await self._connect(codec.result())
        facts = self._submission.facts
        logger.info(
            "%d engines ready in %.1f s: %s, %s, context %d tokens, KV cache %d blocks of %d tokens each; attach at %s",
            len(launch.places),
            time.monotonic() - started,
            launch.model.name if isinstance(launch.model, CheckpointFiles) else "simulated model",
            facts.dtype,
            facts.max_model_len,
            facts.num_blocks,
            facts.block_size,
            shown(self._engines.address),
        )

    async def _start_attached(self, address: str) -> None:
        self._use(AttachedEngines(self._context, self._identity, address, self._dispatcher))
        await self._engines.start()
        await self._connect(await self._load_codec(self._engines.model))
        logger.debug("attached to %d engines at %s", len(self._engines.roster.members), shown(address))

    def _use(self, engines: Engines) -> None:
        self._engines = engines
        self._life.cleanup.push_async_callback(engines.stop)
        self._life.cleanup.callback(self._dispatcher.close, ClientClosedError("the client was closed"))

    async def _load_codec(self, source: ModelSource) -> TextCodec:
        return await asyncio.to_thread(load_codec, source)

    async def _connect(self, codec: TextCodec) -> None:
        await self._dispatcher.wait_engine()  # one that was ready may have died since
        facts = self._engines.roster.members[0].facts
        self._tracing.model = self._model_name
        self._submission = Submission(self._make_preparation(codec, facts), self._dispatcher, self._tracing)

    def _make_preparation(self, codec: TextCodec, facts: EngineFacts) -> Preparation:
        return Preparation(codec, facts)

    async def close(self, drain: bool = True, timeout: float | None = 60.0) -> None:
        """End the client and, if it owns them, its engines.

        drain: let requests finish first (at most `timeout` seconds), while new ones are refused; those of attached
        clients, too, if it owns the engines. Otherwise, and after the timeout, they end with ClientClosedError.
        Idempotent, and safe to call several times at once: the first call decides, but one without drain ends a drain,
        as cancelling the first does; the closing goes on. It does nothing in a fork of the process that the client
        belongs to. When the client's event loop is closed, it can be closed from any other, without drain.
        """
        await self._life.close(_Draining(self) if drain else None, timeout)

    async def __aenter__(self) -> AsyncScaleClient:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._life.is_closing:
            await self._life.wait_closed()  # another task closes it, and perhaps lets requests finish
        else:
            await self.close(drain=False)

    if not TYPE_CHECKING:  # type checkers say as much of their own

        def __enter__(self) -> NoReturn:
            raise TypeError("AsyncScaleClient needs `async with`; synchronous programs use that of asyncscale.blocking")

        def __exit__(self, *_: object) -> None: ...

        def __reduce__(self) -> NoReturn:
            raise client_stays_here()

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
        self._life.check_usable()
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
        self._life.check_usable()
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
        self._life.check_usable()

        def encode() -> list[int]:
            return self._submission.codec.encode_chat(
                messages, add_generation_prompt=add_generation_prompt, **(chat_template_kwargs or {})
            )

        options = RequestOptions(request_id, priority, timeout, engine, session)
        return self._submission.submit(encode, SamplingParams.of(params, sampling), options, self, "chat")

    # --- engines

    @property
    def address(self) -> str:
        """What `AsyncScaleClient.attach` takes, in this process or another.

        With `host`, it holds the key that lets in whoever has it, from wherever it is reached: then it is a secret.
        """
        if self._life.state is not State.RUNNING:
            raise wrong_state(self._life.state, "use")
        return self._engines.address  # also from other loops, threads and forks: to attach there

    def engine_loads(self) -> tuple[EngineLoad, ...]:
        """The newest counts of every engine, and their age. Asks nobody."""
        self._life.check_usable()
        return self._dispatcher.loads()

    def health(self) -> tuple[EngineHealth, ...]:
        """How every engine is: state, age of its last step, restarts, last error. Asks nobody.

        ::

            [engine.engine_id for engine in client.health() if engine.state != "ready"]
        """
        self._life.check_usable()
        return self._engines.roster.health()

    def metrics(self) -> Metrics:
        """What all engines and all clients have counted: requests, tokens, latencies. Asks nobody; from any thread.

        ::

            client.metrics().engines[0].generation_tokens           # the newest that this client knows
            metrics = await client.metrics()                        # of this moment, the same from every client
            metrics.requests.time_to_first_token_seconds.quantile(0.99)

        See `asyncscale.metrics.Metrics`, and `asyncscale.metrics.AsyncScaleCollector` for Prometheus.
        Raises ClientStateError.
        """
        self._life.check_running()
        return self._as_metrics(self._engines.counts())

    @property
    def _model_name(self) -> str:
        model = self._engines.model
        return model.name if isinstance(model, CheckpointFiles) else "simulated"

    def _as_metrics(self, counts: Counts) -> Metrics:
        return Metrics(self._model_name, self._dispatcher.counters.client_id, counts, self._fresh_metrics)

    async def _fresh_metrics(self) -> Metrics:
        self._life.check_usable()
        return self._as_metrics(await self._engines.fresh_counts())

    @property
    def num_malformed(self) -> int:
        """How many messages were dropped because they made no sense: of engines or owner, or, in an owner, of attached
        clients. Engines count what they drop themselves: see ``collective_rpc("process_info")``.
        """
        self._life.check_usable()
        return self._engines.num_malformed + self._dispatcher.num_malformed

    async def watch_loads(self) -> AsyncIterator[tuple[EngineLoad, ...]]:
        """The engines' loads, now and whenever they change::

            async for loads in client.watch_loads():
                if not any(load.waiting for load in loads):
                    break

        Ends when the client is closed.
        """
        while self._life.state is State.RUNNING:
            yield self.engine_loads()
            await self._dispatcher.wait_load_change()

    def dashboard(self) -> Dashboard:
        """In a notebook, show every engine live: its state, requests that run and wait, KV cache, tokens per second.

        ::

            await client.dashboard()

        It shows itself at once and follows the loads, until its own `close()`, the client's, or until its cell is run
        again. Any number of them may be open. Raises ImportError without ipywidgets (the extra "notebook").
        """
        from asyncscale.notebook.dashboard import Dashboard

        self._life.check_usable()
        return Dashboard(self)

    async def collective_rpc(
        self, method: str, /, *args: object, timeout: float | None = 60.0, lockstep: bool = False
    ) -> list[Any]:
        """Run a registered engine method exactly once on every engine; results in engine order.

        ::

            await client.collective_rpc("kv_cache_stats")
            await client.collective_rpc("reset_prefix_cache", lockstep=True)

        Methods: kv_cache_stats, reset_prefix_cache, profile(is_start), pause, drain, resume, process_info,
        speculation_stats; tandem_stats of engines in tandem.
        lockstep: call it between the same two steps of all engines. They come to rest, and none computes before all
        have answered; requests under way go on then.
        Arguments and results are plain values (numbers, strings, lists, dicts). Calls of all clients reach all engines
        in one order. timeout: seconds to wait for the results; what was sent runs all the same.
        Raises EngineError when an engine refuses or fails, EngineDeadError when one dies before it answers,
        TimeoutError.
        """
        self._life.check_usable()
        if not isinstance(method, str):
            raise TypeError(f"method must be the name of an engine's method, got {type(method).__name__}")
        raw = [msgspec.Raw(messages.encoder.encode(argument)) for argument in args]
        if len(args) > messages.MAX_CALL_ARGS or sum(map(len, map(bytes, raw))) > messages.MAX_CALL_BYTES:
            raise ValueError(
                f"a call may have {messages.MAX_CALL_ARGS} arguments of {messages.MAX_CALL_BYTES} bytes, all together"
            )
        try:
            async with asyncio.timeout(timeout):
                results = await self._engines.call(method, raw, lockstep=lockstep)
        except TimeoutError:
            text = f"not every engine has answered {method!r} within {timeout:g} s; it runs there all the same"
            raise TimeoutError(text) from None
        if not results and self._dispatcher.last_death is not None:
            raise fresh(self._dispatcher.last_death)
        return [_value(result) for result in results]

    async def update_weights(self, path: str | os.PathLike[str], *, recompute: bool = True) -> int:
        """Have all engines compute with other weights; requests under way go on with them. Returns their version.

        ::

            version = await client.update_weights("step-100.safetensors")
            completion = await client.generate("The sky is", max_tokens=16)
            completion.weight_versions  # (1,)

        path: a safetensors file, or a folder of them, on the owner's host, under the names that the model's own files
        have. Tensors that are not in it stay as they are. It is copied: it may be changed or removed afterwards.
        recompute: keys and values of what requests under way have so far are computed anew with the new weights; else
        they go on with those that they have.
        The engines load it while they compute, and change between the same two steps. Weights of the start are version
        0, and every update is the next one. Cancelling the call does not stop it.
        Raises ModelLoadError, which names file and tensor, where it does not fit the model, EngineDeadError where no
        engine is left that could load it; then nothing has changed.
        """
        self._life.check_usable()
        return await update_weights(self._engines, path, recompute)

    def __repr__(self) -> str:
        what = (
            f"attached to {shown(self._attach_to)!r}"
            if self._attach_to
            else f"{self._plan.model!r}, num_engines={self._plan.num_engines}"
        )
        return f"<AsyncScaleClient {what}, {self._life.state.value}>"

    def _repr_html_(self) -> str:
        from asyncscale.notebook.client_card import client_html

        return client_html(self)


class _Draining:
    """Lets requests finish; those of attached clients, too, when the engines end with this one."""

    def __init__(self, client: AsyncScaleClient) -> None:
        self._client = client

    async def drain(self) -> None:
        dispatcher = self._client._dispatcher
        dispatcher.refuse_waiting(ClientClosedError("the client was closed"))
        await dispatcher.wait_idle()
        if self._client._attach_to is None:
            await dispatcher.call("drain", [])
            while any(load.running or load.waiting for load in dispatcher.loads()):
                await dispatcher.wait_load_change()

    @property
    def num_undone(self) -> int:
        return self._client._dispatcher.num_in_flight


def _value(result: messages.EngineResult) -> Any:
    if result.error is None:
        try:
            return msgspec.msgpack.decode(result.value)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise EngineError("the engine's result cannot be read", engine_id=result.engine_id) from None
    kind = EngineDeadError if result.died else EngineError
    raise kind(result.error, engine_id=result.engine_id)
