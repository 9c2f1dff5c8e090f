"""The protocol between clients and engines, on one page: msgpack of tagged structs, one union per direction.

A client's DEALER sends `ToEngine` to each engine's ROUTER; the engine answers with `FromEngine`. Each request is known by
(client, request_id); ids are chosen by the client and never used twice. The n choices of a request have consecutive ids.
Messages for unknown ids are legal (an abort may cross the last token) and ignored. Nothing here does I/O.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from asyncscale.params import Sampling

PROTOCOL_VERSION = 1

FinishReason = Literal["stop", "length", "abort", "error"]


class Load(msgspec.Struct, frozen=True, array_like=True):
    """An engine's load at one moment. `mine` counts those of running + waiting that the receiving client sent."""

    step: int
    running: int
    waiting: int
    mine: int
    used_blocks: int
    num_blocks: int


class EngineFacts(msgspec.Struct, frozen=True):
    """What an engine learned while it loaded its model."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    dtype: str
    load_s: float


# --- client to engine


class Connect(msgspec.Struct, frozen=True, array_like=True, tag="connect"):
    """First message of a client. `watch_loads` asks for a `LoadReport` whenever the engine's load changes."""

    version: int
    watch_loads: bool = False


class Add(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    """A request. token_ids: little-endian int32 of the prompt, then of the tokens generated earlier (elsewhere), if any.

    Its `n` choices are request_id .. request_id + n - 1. num_prompt_tokens: how many of token_ids are the prompt.
    """

    request_id: int
    token_ids: bytes
    num_prompt_tokens: int
    sampling: Sampling
    n: int = 1
    priority: int = 0


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """These requests are no longer wanted."""

    request_ids: list[int]


class Call(msgspec.Struct, frozen=True, array_like=True, tag="call"):
    """Run a registered engine method. Arguments are msgpack values."""

    call_id: int
    method: str
    args: list[msgspec.Raw]


class Disconnect(msgspec.Struct, frozen=True, array_like=True, tag="disconnect"):
    """The client leaves: its requests are aborted and it is forgotten."""


ToEngine = Connect | Add | Abort | Call | Disconnect


# --- engine to client


class Connected(msgspec.Struct, frozen=True, array_like=True, tag="connected"):
    """Answer to Connect."""

    facts: EngineFacts
    load: Load


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: of the chosen token first, then of the most likely ones, best first.

    rank: of the chosen token among the whole vocabulary, 1 is the most likely.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """The end of a request. Its last token is in the same or an earlier `Outputs`.

    stop_token_id: the token that ended it, when one of its stop_token_ids did. Times in seconds since the engine had it.
    """

    request_id: int
    reason: FinishReason
    stop_token_id: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queued_s: float = 0.0
    first_token_s: float = 0.0


class Outputs(msgspec.Struct, frozen=True, array_like=True, tag="outputs"):
    """All that one step made for one client. request_ids[i] got token_ids[i]; an id with several tokens comes several times."""

    request_ids: list[int]
    token_ids: list[int]
    finished: list[Finished]
    load: Load
    logprobs: list[tuple[int, TokenLogprobs]] = []  # (index into token_ids, ...)
    prompt_logprobs: list[tuple[int, list[TokenLogprobs]]] = []  # (request_id, of the next prompt positions; the first is position 1)


class LoadReport(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """The engine's load for a client that watches it; by_client: DEALER identity -> how many requests it has here."""

    load: Load
    by_client: dict[bytes, int]


class CallResult(msgspec.Struct, frozen=True, array_like=True, tag="result"):
    """Answer to Call: `value` (msgpack) or `error`."""

    call_id: int
    value: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: str | None = None


FromEngine = Connected | Outputs | LoadReport | CallResult

encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
