"""The requests of a client that have not ended, by every name that they have."""

from __future__ import annotations

from collections.abc import Iterator

from asyncscale.client.choice import ChoiceStream
from asyncscale.client.stream import RequestStream


class LiveRequests:
    """Iterates over them in the order in which they came.

    choices: whose tokens come under which wire id; others only read it, and for each token.
    """

    def __init__(self) -> None:
        self._requests: dict[str, RequestStream] = {}  # by their caller's id
        self.choices: dict[int, ChoiceStream] = {}
        self._next_wire_id = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[RequestStream]:
        return iter(list(self._requests.values()))  # who is looked at may end

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def aboard(self, engine_id: int) -> list[RequestStream]:
        """Those that were sent to this engine."""
        return [request for request in self._requests.values() if request.engine_id == engine_id]

    def allocate_wire_ids(self, count: int) -> int:
        """The first of `count` consecutive ids that were never used before."""
        first = self._next_wire_id
        self._next_wire_id += count
        return first

    def add(self, request: RequestStream) -> None:
        """The request begins."""
        self._requests[request.request_id] = request
        for choice in request.choices:
            self.choices[choice.wire_id] = choice

    def renumber(self, request: RequestStream) -> None:
        """Give what is left of it new wire ids: the old ones may still be in messages that have not arrived."""
        for choice in request.open_choices:
            del self.choices[choice.wire_id]
            choice.wire_id = self.allocate_wire_ids(1)
            self.choices[choice.wire_id] = choice

    def discard_choice(self, choice: ChoiceStream) -> None:
        """No more tokens are wanted of it."""
        self.choices.pop(choice.wire_id, None)

    def discard(self, request: RequestStream) -> None:
        """The request has ended."""
        self._requests.pop(request.request_id, None)
        for choice in request.choices:
            self.choices.pop(choice.wire_id, None)
