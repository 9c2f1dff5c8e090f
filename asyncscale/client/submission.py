"""From the arguments of a call to a request under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from asyncscale.client.dispatcher import Dispatcher
from asyncscale.client.generation import Generation
from asyncscale.client.preparation import Preparation, Prompt, RequestOptions
from asyncscale.client.stream import RequestStream
from asyncscale.errors import InvalidRequestError, RequestTimeoutError
from asyncscale.messages import EngineFacts
from asyncscale.params import SamplingParams
from asyncscale.tokenization.codec import TextCodec

# What is longer is for ever: event loops have no timers for it.
_LONGEST_TIMEOUT_S = 1e8


class Submission:
    """Checks requests, makes their streams, and hands them to the dispatcher."""

    def __init__(self, preparation: Preparation, dispatcher: Dispatcher) -> None:
        self._preparation = preparation
        self._dispatcher = dispatcher

    @property
    def codec(self) -> TextCodec:
        return self._preparation.codec

    @property
    def facts(self) -> EngineFacts:
        return self._preparation.facts

    def submit(
        self, make_prompt: Callable[[], Prompt], params: SamplingParams, options: RequestOptions, client: object
    ) -> Generation:
        """Start a request. make_prompt: called when the options have proved right. client: lives while it is read.

        Raises InvalidRequestError, EngineDeadError, and what a routing policy of the user's raises.
        """
        dispatcher = self._dispatcher
        options.validate(dispatcher.engine_ids)
        if options.request_id is not None and dispatcher.is_live(options.request_id):
            raise InvalidRequestError(f"request_id {options.request_id!r} is in use by a request that has not ended")
        stream = self._make_stream(self._preparation.encode_prompt(make_prompt()), params, options)
        dispatcher.submit(stream)
        if options.timeout is not None and options.timeout < _LONGEST_TIMEOUT_S:
            error = RequestTimeoutError(f"request {stream.request_id!r} did not finish within {options.timeout:g} s")
            loop = asyncio.get_running_loop()
            stream.timer = loop.call_later(options.timeout, dispatcher.abort, stream, error)
        return Generation(stream, dispatcher.abort, client)

    def _make_stream(
        self, prompt_token_ids: npt.NDArray[np.int32], params: SamplingParams, options: RequestOptions
    ) -> RequestStream:
        dispatcher = self._dispatcher
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
