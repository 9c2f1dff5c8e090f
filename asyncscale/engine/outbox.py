"""What one step made, sorted by the client that it goes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from asyncscale.engine.batch import Int32, StepResult
from asyncscale.engine.request import Request
from asyncscale.messages import Finished, Load, Outputs, Started, TokenLogprobs


@dataclass(slots=True)
class _Draft:
    """One client's Outputs in the making."""

    request_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, list[TokenLogprobs]]] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)


class Outbox:
    """Collects tokens and endings, and makes one Outputs per client of them.

    Rows carry a small number for their client, so that a step's tokens are split by client with one sort.
    weight_version: of the weights that make what is collected from now on; may be set between two steps.
    """

    def __init__(self, max_num_seqs: int, weight_version: int = 0) -> None:
        self.weight_version = weight_version
        self._request_ids: npt.NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        self._client_numbers: npt.NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        self._num_prompt_logprobs = [0] * max_num_seqs  # prompt positions seen since the row was occupied
        self._numbers: dict[bytes, int] = {}
        self._clients: dict[int, bytes] = {}
        self._next_number = 0
        self._drafts: dict[bytes, _Draft] = {}

    def __len__(self) -> int:
        return len(self._drafts)

    def add(self, row: int, request: Request) -> None:
        if request.client not in self._numbers:
            self._numbers[request.client] = self._next_number
            self._clients[self._next_number] = request.client
            self._next_number += 1
        self._request_ids[row] = request.request_id
        self._client_numbers[row] = self._numbers[request.client]
        self._num_prompt_logprobs[row] = 0

    def remove(self, row: int) -> None:
        pass  # what the row said stays true until it is occupied anew

    def forget(self, client: bytes) -> None:
        """The client has no requests any more (it may come back)."""
        number = self._numbers.pop(client, None)
        if number is not None:
            del self._clients[number]

    def discard(self, client: bytes) -> None:
        """Nobody will read what was collected for this client."""
        self._drafts.pop(client, None)

    def put_tokens(self, result: StepResult) -> None:
        """Each of result.rows' new token, with its log-probabilities where there are any."""
        if len(self._clients) == 1:
            draft = self._draft(next(iter(self._clients.values())))
            self._fill(draft, result, result.rows, result.token_ids)
            return
        order = self._client_numbers[result.rows].argsort(kind="stable")
        rows, token_ids = result.rows[order], result.token_ids[order]
        numbers = self._client_numbers[rows]
        starts = (np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist()
        for start, end in pairwise([0, *starts, len(rows)] if len(rows) else []):
            draft = self._draft(self._clients[int(numbers[start])])
            self._fill(draft, result, rows[start:end], token_ids[start:end])

    def _fill(self, draft: _Draft, result: StepResult, rows: Int32, token_ids: Int32) -> None:
        draft.request_ids = self._request_ids[rows].tolist()
        draft.token_ids = token_ids.tolist()
        if result.logprobs:
            logprobs = enumerate(map(result.logprobs.get, rows.tolist()))
            draft.logprobs = [(index, entry) for index, entry in logprobs if entry is not None]

    def put_prompt_logprobs(self, request: Request, entries: list[TokenLogprobs]) -> None:
        """The next prompt positions of a running request, less those that its client has from before a preemption."""
        seen = self._num_prompt_logprobs[request.row]
        self._num_prompt_logprobs[request.row] = seen + len(entries)
        fresh = entries[max(request.num_prompt_logprobs - seen, 0) :]
        if fresh:
            request.num_prompt_logprobs += len(fresh)
            self._draft(request.client).prompt_logprobs.append((request.request_id, fresh))

    def put_started(self, client: bytes, started: Started) -> None:
        self._draft(client).started.append(started)

    def put_preempted(self, request: Request) -> None:
        self._draft(request.client).preempted.append(request.request_id)

    def put_finished(self, client: bytes, finished: Finished) -> None:
        self._draft(client).finished.append(finished)

    def flush(self, load: Callable[[bytes], Load]) -> dict[bytes, Outputs]:
        """Hand out all that was collected; `load` gives the Load that goes to a client."""
        drafts, self._drafts = self._drafts, {}
        return {
            client: Outputs(
                draft.request_ids,
                draft.token_ids,
                draft.finished,
                load(client),
                draft.logprobs,
                draft.prompt_logprobs,
                started=draft.started,
                preempted=draft.preempted,
                weight_version=self.weight_version,
            )
            for client, draft in drafts.items()
        }

    def _draft(self, client: bytes) -> _Draft:
        return self._drafts.setdefault(client, _Draft())
