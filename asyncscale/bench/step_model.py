"""What the pauses between tokens should have been, had every engine step taken just its modelled time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asyncscale import SimulatedModel

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """One request's tokens. times_s: when each came, in order, at least one; on any clock that all requests share."""

    num_prompt_tokens: int
    times_s: Sequence[float]


def step_time_ratio(by_engine: Mapping[int, Sequence[Arrivals]], model: SimulatedModel) -> float:
    """All measured pauses between two tokens of a request, over the modelled times of the steps between them.

    1.0 is an engine and a client that cost no time at all. by_engine: all requests that each engine ran. Every running
    request gets one token per step. So between two tokens of a request, others get as many as there are requests in
    the step, whatever time each took to be read; those that get their first token had their prompts computed in it.
    NaN when no request has two tokens.
    """
    pairs = [_pauses(requests, model) for requests in by_engine.values()]
    measured = sum(float(pauses.sum()) for pauses, _ in pairs)
    modelled = sum(float(expected.sum()) for _, expected in pairs)
    return measured / modelled if modelled else float("nan")


def _pauses(requests: Sequence[Arrivals], model: SimulatedModel) -> tuple[Float64, Float64]:
    """Of one engine, per token after a request's first: the pause before it, and the modelled step. In seconds."""
    firsts = _sorted([(request.times_s[0], request.num_prompt_tokens) for request in requests])
    prompt_tokens = np.concatenate([[0], np.cumsum(firsts[:, 1])])
    decoded = np.sort(_joined(request.times_s[1:] for request in requests))
    ends = _joined(request.times_s[1:] for request in requests)
    starts = _joined(request.times_s[:-1] for request in requests)

    def between(times: Float64) -> npt.NDArray[np.int64]:
        """How many of these sorted times are after each start and not after its end, by indices of both."""
        return np.stack([np.searchsorted(times, starts, "right"), np.searchsorted(times, ends, "right")])

    first_decode, last_decode = between(decoded)
    first_prompt, last_prompt = between(firsts[:, 0])
    num_decodes = last_decode - first_decode
    num_prompt_tokens = prompt_tokens[last_prompt] - prompt_tokens[first_prompt]
    expected = model.base_ms * 1e-3 + model.decode_us * 1e-6 * num_decodes + model.prefill_us * 1e-6 * num_prompt_tokens
    return ends - starts, expected


def _sorted(rows: list[tuple[float, int]]) -> Float64:
    return np.array(sorted(rows), np.float64).reshape(-1, 2)


def _joined(parts: Iterable[Sequence[float]]) -> Float64:
    return np.concatenate([np.zeros(0), *(np.asarray(part, np.float64) for part in parts)])
