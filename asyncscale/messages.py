"""The protocol, all of it: msgpack of tagged structs, one union per direction.

A client's DEALER sends `ToEngine` to each engine's ROUTER; the engine answers with `FromEngine`. Each request is
known by (client, request_id); ids are chosen by the client and never used twice. The n choices of a request have
consecutive ids. Messages for unknown ids are legal (an abort may cross the last token) and ignored. Nothing here does
I/O.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal, TypeVar

import msgspec

from asyncscale.address import parse, shown
from asyncscale.config import ModelSource
from asyncscale.metrics.catalog import ENGINE_LAYOUT, REQUEST_LAYOUT
from asyncscale.params import Sampling
from asyncscale.tandem.messages import Broken, GroupState, Met, Paused, Wake

PROTOCOL_VERSION = 1

# Every client hears of a change of load from the engine itself after so long at the latest, whatever else it is told.
LOAD_INTERVAL_S = 0.05

# The identity of each of a client's DEALERs is the client's id, of so many bytes, and random ones that tell this
# connection from earlier ones: what was sent over those ended with them.
CLIENT_ID_SIZE = 17
CONNECTION_ID_SIZE = 8

# A client says so after so many messages from an engine that it has read. One that has twice as many unread is told of
# no change of load until it reads: the tokens of its requests are then all that is queued for it.
READ_INTERVAL = 500

FinishReason = Literal["stop", "length", "abort", "error"]

# The longest message that a client may send, in bytes, besides 4 for each token of the model's context: room for all of
# `Sampling` at its limits, and for a Call's arguments. Whoever sends more is disconnected before it is read.
MAX_REQUEST_BYTES = 8 * 2**20
# Likewise of engines and coordinator; log-probabilities of a long prompt are their longest.
MAX_ANSWER_BYTES = 2**30
# The arguments of one call of a method, in bytes, all together.
MAX_CALL_BYTES = 2**20
MAX_CALL_ARGS = 64
_MAX_ABORTS = 65_536
_MAX_ENGINES = 65_536

# No text of an engine's log record is as long: see `asyncscale.engine.log_relay`.
_MAX_LOG_TEXT = 2**13
_LogText = Annotated[str, msgspec.Meta(max_length=_MAX_LOG_TEXT)]

Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
EngineId = Annotated[int, msgspec.Meta(ge=0, lt=_MAX_ENGINES)]

# Rows of numbers, see `asyncscale.metrics.layout`.
_Cell = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
EngineRow = Annotated[list[_Cell], msgspec.Meta(min_length=ENGINE_LAYOUT.size, max_length=ENGINE_LAYOUT.size)]
RequestRow = Annotated[list[_Cell], msgspec.Meta(min_length=REQUEST_LAYOUT.size, max_length=REQUEST_LAYOUT.size)]
RequestRows = Annotated[dict[EngineId | None, RequestRow], msgspec.Meta(max_length=_MAX_ENGINES)]


class Load(msgspec.Struct, frozen=True, array_like=True):
    """An engine's load at one moment.

    version: grows with every change, so that older reports can be told. mine: how many of running + waiting the
    receiving client sent. tokens: the `Add.weight` of all running and waiting ones together; my_tokens: of mine.
    used_blocks, num_blocks: of the KV cache. accepting: False while the engine is paused or drained, and new requests
    should go elsewhere. share: the receiving client's part of max_num_seqs, if all that have requests here had equal
    ones; until it has so many, it may send more, though the engine is full.
    """

    version: Count
    running: Count
    waiting: Count
    mine: Count
    tokens: Count
    my_tokens: Count
    used_blocks: Count
    num_blocks: Count
    accepting: bool = True
    share: Count = 0


# Client id -> how many requests that client has here, and their weight in tokens.
Shares = dict[bytes, tuple[Count, Count]]


def fair_share(capacity: int, client: bytes, clients: Collection[bytes]) -> int:
    """Of `capacity` requests at once, for one client beside `clients`, those that have requests."""
    return max(1, capacity // (len(clients) + (client not in clients)))


class EngineFacts(msgspec.Struct, frozen=True):
    """What an engine learned while it loaded its model.

    pid: of its process, on its host. in_tandem: it computes together with all others, and only when they are all there.
    weight_version: of the weights that it has loaded.
    """

    vocab_size: Positive
    max_model_len: Positive
    max_num_seqs: Positive
    block_size: Positive
    num_blocks: Positive
    dtype: str
    load_s: float
    pid: Positive | None = None
    in_tandem: bool = False
    weight_version: Count = 0


# --- client to engine


class Connect(msgspec.Struct, frozen=True, array_like=True, tag="connect"):
    """First message of a client, answered with a `LoadReport`.

    From then on it is told the engine's load, within `LOAD_INTERVAL_S` of a change. watch_loads: as soon as it changes,
    and everybody's share with it; may be switched on and off by sending Connect again.
    """

    version: int
    watch_loads: bool = False


class Add(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    """A request.

    token_ids: little-endian int32 of the prompt, then of the tokens that were generated elsewhere before, if any.
    Its `n` choices are request_id .. request_id + n - 1. num_prompt_tokens: how many of token_ids are the prompt.
    weight: the work in each choice by the client's estimate, in tokens; the engine only adds it up, in its `Load`.
    """

    request_id: int
    token_ids: bytes
    num_prompt_tokens: int
    sampling: Sampling
    n: int = 1
    priority: int = 0
    weight: int = 0


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """These requests are no longer wanted."""

    request_ids: Annotated[list[int], msgspec.Meta(max_length=_MAX_ABORTS)]


class Call(msgspec.Struct, frozen=True, array_like=True, tag="call"):
    """Run a registered engine method. Arguments are msgpack values."""

    call_id: int
    method: str
    args: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_CALL_ARGS)]


class Read(msgspec.Struct, frozen=True, array_like=True, tag="read"):
    """So many more messages from the engine have been read; sent every `READ_INTERVAL` of them."""

    count: Count


class Disconnect(msgspec.Struct, frozen=True, array_like=True, tag="disconnect"):
    """The client leaves: its requests are aborted and it is forgotten."""


ToEngine = Connect | Add | Abort | Call | Read | Disconnect


# --- engine to client


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: of the chosen token first, then of the most likely ones, best first.

    rank: of the chosen token among the whole vocabulary, 1 is the most likely.
    """

    token_ids: Annotated[list[int], msgspec.Meta(min_length=1)]
    logprobs: list[float]
    rank: int

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError("token_ids and logprobs must be of equal length")


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """The end of a request. Its last token is in the same or an earlier `Outputs`.

    stop_token_id: the token that ended it, when one of its stop_token_ids did.
    """

    request_id: int
    reason: FinishReason
    stop_token_id: int | None = None
    error: str | None = None


class Started(msgspec.Struct, frozen=True, array_like=True):
    """The prompt of a request is computed, and its first token is in the same `Outputs`. Said once by each engine.

    queued_s: seconds from when the engine had it until its first step; prefill_s: from there to the first token.
    num_cached_tokens: of the prompt, found in the prefix cache.
    """

    request_id: int
    queued_s: Seconds
    prefill_s: Seconds
    num_cached_tokens: Count


class Outputs(msgspec.Struct, frozen=True, array_like=True, tag="outputs"):
    """All that one step made for one client.

    Request_ids[i] got token_ids[i]; an id with several tokens comes several times. by_client: see `LoadReport`.
    preempted: ids of requests that lost their KV blocks to others, and will be computed again. weight_version: of the
    weights that made the tokens.
    """

    request_ids: list[int]
    token_ids: list[int]
    finished: list[Finished]
    load: Load
    logprobs: list[tuple[int, TokenLogprobs]] = []  # (index into token_ids, ...)
    prompt_logprobs: list[
        tuple[int, list[TokenLogprobs]]
    ] = []  # (request_id, of the next prompt positions; the first is position 1)
    by_client: Shares | None = None
    started: list[Started] = []
    preempted: list[int] = []
    weight_version: Count = 0

    def __post_init__(self) -> None:
        if len(self.request_ids) != len(self.token_ids):
            raise ValueError("request_ids and token_ids must be of equal length")
        if self.logprobs and not all(0 <= index < len(self.token_ids) for index, _ in self.logprobs):
            raise ValueError("logprobs must hold indices into token_ids")


class LoadReport(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """The engine's load outside of any Outputs.

    by_client: each client's share, for those who watch.
    """

    load: Load
    by_client: Shares | None = None


class CallResult(msgspec.Struct, frozen=True, array_like=True, tag="result"):
    """Answer to Call: `value` (msgpack) or `error`."""

    call_id: int
    value: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: str | None = None


class Preparation(msgspec.Struct, frozen=True):
    """How far an engine is with new weights, as a CallResult's value. error: why it cannot have them."""

    fraction: float
    done: bool
    error: str | None = None


FromEngine = Outputs | LoadReport | CallResult


# --- between an engine process and its supervisor, over the lifeline


class Loading(msgspec.Struct, frozen=True, array_like=True, tag="loading"):
    """What the engine does now, and how far it is with it (0 to 1)."""

    phase: str
    fraction: Annotated[float, msgspec.Meta(ge=0, le=1)]


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The engine has loaded its model, and clients reach it at this address."""

    facts: EngineFacts
    address: str

    def __post_init__(self) -> None:
        parse(self.address)

    def __repr__(self) -> str:
        return f"Ready({self.facts!r}, {shown(self.address)!r})"


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The engine cannot start, or go on. model_error: the message of a ModelLoadError, when it was one.

    is_final: it is not to be started again.
    """

    traceback: str
    model_error: str | None = None
    is_final: bool = False


class Logged(msgspec.Struct, frozen=True, array_like=True, tag="logged"):
    """A record for the owner's handlers, at any time: the fields of `logging.LogRecord`.

    text: the formatted message; template: before that. error: the formatted exception. created: seconds since 1970.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"^asyncscale(\.|$)", max_length=_MAX_LOG_TEXT)]
    level: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    text: _LogText
    template: _LogText
    created: Seconds
    path: _LogText
    line: Count
    function: _LogText
    thread: _LogText = ""
    error: _LogText | None = None


FromEngineProcess = Loading | Ready | Failed | Logged | Met | Paused | Broken


class LogLevels(msgspec.Struct, frozen=True, array_like=True, tag="log-levels"):
    """From the owner: from which level on it wants to hear of which loggers."""

    levels: dict[str, int]


ToEngineProcess = LogLevels | GroupState


# --- front end to the process that started it


class Returned(msgspec.Struct, frozen=True, array_like=True, tag="returned"):
    """`main` returned. result: pickled."""

    result: bytes


class Raised(msgspec.Struct, frozen=True, array_like=True, tag="raised"):
    """`main` raised, or what it returned cannot be pickled.

    error: pickled; None when it cannot be. summary: one line that says what happened.
    """

    error: bytes | None
    summary: str
    traceback: str


FromFrontend = Returned | Raised


# --- between an attached client and the coordinator


class Member(msgspec.Struct, frozen=True, array_like=True):
    """An engine that takes requests. `load.mine` is the receiving client's.

    address: over tcp with the key, so this is told only to who is let in himself. incarnation: how often it was started
    again. last_error: how the incarnation before this one ended. progress_path: of a file on its host, see
    `asyncscale.progress`.
    """

    engine_id: EngineId
    incarnation: Count
    address: str
    facts: EngineFacts
    load: Load
    last_error: str | None = None
    progress_path: str | None = None

    def __post_init__(self) -> None:
        parse(self.address)

    def __repr__(self) -> str:
        return f"Member({self.engine_id}, {self.incarnation}, {shown(self.address)!r}, {self.facts!r}, {self.load!r})"


class Attach(msgspec.Struct, frozen=True, array_like=True, tag="attach"):
    """First message of a client to the coordinator."""

    version: int


class Detach(msgspec.Struct, frozen=True, array_like=True, tag="detach"):
    """The client leaves."""


class CollectiveCall(msgspec.Struct, frozen=True, array_like=True, tag="collective-call"):
    """Run a registered method once on every engine. Calls of all clients reach all engines in one order.

    lockstep: between the same two steps of all of them.
    """

    call_id: int
    method: str
    args: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_CALL_ARGS)]
    lockstep: bool = False


class MetricsReport(msgspec.Struct, frozen=True, array_like=True, tag="metrics-report"):
    """All that the client has counted of its requests so far, by the engine that had them last: so it does no harm if
    one is lost. round_id: of the MetricsRound that this answers."""

    rows: RequestRows
    round_id: int | None = None


class MetricsQuery(msgspec.Struct, frozen=True, array_like=True, tag="metrics-query"):
    """What have all engines and clients counted? Answered with MetricsAnswer.

    fresh: after a round over all clients; else with what they reported last.
    """

    query_id: int
    fresh: bool


ToCoordinator = Attach | Detach | CollectiveCall | MetricsReport | MetricsQuery | Wake


class Joined(msgspec.Struct, frozen=True, array_like=True, tag="joined"):
    """An engine takes requests from now on."""

    member: Member


class Left(msgspec.Struct, frozen=True, array_like=True, tag="left"):
    """An engine died.

    reason: how, in a sentence; stderr_tail: the end of what it wrote to stderr. returns: it is started again, and will
    be announced by Joined; sent once more, with False, when it is given up.
    """

    engine_id: EngineId
    incarnation: Count
    reason: str
    exit_code: int | None
    stderr_tail: str = ""
    returns: bool = False


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """Answer to Attach: the model, every engine with its counts, and those that died and are not back.

    group: of engines in tandem.

    Sent again to a client that could not be told of every change; it replaces what the client knew.
    """

    version: int
    model: ModelSource
    members: list[Member]
    left: list[Left] = []
    group: GroupState | None = None


class Counts(msgspec.Struct, frozen=True, array_like=True, tag="counts"):
    """The newest loads of engines whose load changed: (engine_id, load)."""

    loads: list[tuple[EngineId, Load]]


class Farewell(msgspec.Struct, frozen=True, array_like=True, tag="farewell"):
    """The owner closes: all engines end now."""


class EngineResult(msgspec.Struct, frozen=True, array_like=True):
    """One engine's answer: `value` (msgpack) or `error`. died: the engine did, before it answered."""

    engine_id: EngineId
    value: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: str | None = None
    died: bool = False


class CollectiveResult(msgspec.Struct, frozen=True, array_like=True, tag="collective-result"):
    """Answer to CollectiveCall, in engine order."""

    call_id: int
    results: list[EngineResult]


class MetricsRound(msgspec.Struct, frozen=True, array_like=True, tag="metrics-round"):
    """Answer with a MetricsReport at once."""

    round_id: int


class MetricsAnswer(msgspec.Struct, frozen=True, array_like=True, tag="metrics-answer"):
    """Answer to MetricsQuery. clients: by what they are called in metrics."""

    query_id: int
    engines: dict[EngineId, EngineRow]
    clients: dict[str, RequestRows]


FromCoordinator = (
    Welcome | Joined | Left | Counts | CollectiveResult | MetricsRound | MetricsAnswer | Farewell | GroupState
)


Message = TypeVar("Message")


def decode(decoder: msgspec.msgpack.Decoder[Message], payload: bytes) -> Message | None:
    """The message in `payload`, or None: bytes from a socket are hostile until decoded, and whatever is wrong with them
    (truncated, of another type, not UTF-8, nested without end) is the sender's fault and no reason to fail."""
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
from_engine_process_decoder: msgspec.msgpack.Decoder[FromEngineProcess] = msgspec.msgpack.Decoder(FromEngineProcess)
to_engine_process_decoder: msgspec.msgpack.Decoder[ToEngineProcess] = msgspec.msgpack.Decoder(ToEngineProcess)
from_frontend_decoder: msgspec.msgpack.Decoder[FromFrontend] = msgspec.msgpack.Decoder(FromFrontend)
to_coordinator_decoder: msgspec.msgpack.Decoder[ToCoordinator] = msgspec.msgpack.Decoder(ToCoordinator)
from_coordinator_decoder: msgspec.msgpack.Decoder[FromCoordinator] = msgspec.msgpack.Decoder(FromCoordinator)
