"""From the arguments of a call to a request under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.exceptions import fresh
from asyncscale.client.generation import Generation
from asyncscale.client.preparation import Preparation, Prompt, RequestOptions
from asyncscale.client.stream import RequestStream
from asyncscale.client.tracing import Tracing
from asyncscale.errors import InvalidRequestError, RequestAbortedError, RequestTimeoutError
from asyncscale.messages import EngineFacts
from asyncscale.params import SamplingParams
from asyncscale.tokenization.codec import TextCodec

# What is longer is for ever: event loops have no timers for it.
_LONGEST_TIMEOUT_S = 1e8


class Submission:
    """Checks requests, makes their streams, and hands them to the dispatcher."""

    def __init__(self, preparation: Preparation, dispatcher: Dispatcher, tracing: Tracing | None = None) -> None:
        self._preparation = preparation
        self._dispatcher = dispatcher
        self._tracing = tracing or Tracing(None)

    @property
    def codec(self) -> TextCodec:
        return self._preparation.codec

    @property
    def facts(self) -> EngineFacts:
        return self._preparation.facts

    def submit(
        self,
        make_prompt: Callable[[], Prompt],
        params: SamplingParams,
        options: RequestOptions,
        client: object,
        operation: str = "text_completion",
    ) -> Generation:
        """Start a request. make_prompt: called when the options have proved right. client: lives while it is read.
        operation: see `Tracing.follow`.

        Raises InvalidRequestError, OverloadedError, EngineDeadError, and what a routing policy of the user's raises.
        """
        self._validate(options)
        self._dispatcher.check_room(options.engine)  # before any work
        stream = self._make_stream(make_prompt(), params, options)
        self._dispatcher.check_room(options.engine, len(stream.prompt_token_ids))
        self._dispatcher.submit(stream)
        self._tracing.follow(stream, operation)
        self._start_timer(stream, options)
        return Generation(stream, self._dispatcher.abort, client)

    async def submit_in_turn(
        self, make_prompt: Callable[[], Prompt], params: SamplingParams, options: RequestOptions, client: object
    ) -> Generation:
        """Start a request when there is a place for it. Raises what `submit` raises, and what ends it while it waits:
        RequestTimeoutError, ClientClosedError, EngineDeadError."""
        self._validate(options)
        stream = self._make_stream(make_prompt(), params, options)
        admitted = self._dispatcher.submit_in_turn(stream)
        self._tracing.follow(stream, "text_completion")
        self._start_timer(stream, options)
        try:
            await admitted
        except asyncio.CancelledError:
            self._dispatcher.abort(stream, RequestAbortedError(f"request {stream.request_id!r} was aborted"))
            raise
        if stream.error is not None:
            raise fresh(stream.error)
        return Generation(stream, self._dispatcher.abort, client)

    def _validate(self, options: RequestOptions) -> None:
        options.validate(self._dispatcher.engine_ids)
        if options.request_id is not None and self._dispatcher.is_live(options.request_id):
            raise InvalidRequestError(f"request_id {options.request_id!r} is in use by a request that has not ended")

    def _start_timer(self, stream: RequestStream, options: RequestOptions) -> None:
        if options.timeout is not None and options.timeout < _LONGEST_TIMEOUT_S and not stream.done:
            error = RequestTimeoutError(f"request {stream.request_id!r} did not finish within {options.timeout:g} s")
            stream.timer = asyncio.get_running_loop().call_later(options.timeout, self._dispatcher.abort, stream, error)

    def _make_stream(self, prompt: Prompt, params: SamplingParams, options: RequestOptions) -> RequestStream:
        dispatcher = self._dispatcher
        prompt_token_ids = self._preparation.encode_prompt(prompt)
        sampling = self._preparation.resolve(params, len(prompt_token_ids))
        wire_id = dispatcher.allocate_wire_ids(params.n)
        return RequestStream(
            request_id=f"request-{wire_id}" if options.request_id is None else options.request_id,
            wire_id=wire_id,
            prompt_token_ids=prompt_token_ids,
            params=params,
            sampling=sampling,
            codec=self._preparation.codec,
            priority=options.priority,
            session=options.session,
            pinned_engine=options.engine,
            arrival=time.monotonic(),
            expected_output_tokens=dispatcher.expected_output_tokens(sampling.max_tokens),
            on_end=dispatcher.request_ended,
        )
