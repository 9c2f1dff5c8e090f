"""How much clients may leave with an engine: so many that no program needs more, so few that its memory holds them."""

from __future__ import annotations

from asyncscale.engine.request import Request
from asyncscale.messages import Add
from asyncscale.params import Sampling

# Requests alive (each choice counts), and the bytes that they take, of one client and of all together.
MAX_REQUESTS_PER_CLIENT = 65_536
MAX_REQUESTS = 4 * MAX_REQUESTS_PER_CLIENT
MAX_BYTES_PER_CLIENT = 2**30
MAX_BYTES = 2 * MAX_BYTES_PER_CLIENT

# Of a request besides its tokens, and of each entry in its sampling parameters' lists.
_REQUEST_BYTES = 2048
_ENTRY_BYTES = 128


class Quota:
    """Counts what each client's requests take::

    refusal = quota.find_excess(client, message)    # None: there is room
    quota.take(request)                             # each that was accepted
    quota.give_back(request)                        # when it ends
    """

    def __init__(self) -> None:
        self._num_requests: dict[bytes, int] = {}
        self._num_bytes: dict[bytes, int] = {}
        self._all_requests = 0
        self._all_bytes = 0

    def find_excess(self, client: bytes, message: Add) -> str | None:
        """Why there is no room for this request, if there is none."""
        num_bytes = message.n * _size(len(message.token_ids), message.sampling)
        requests, taken = self._num_requests.get(client, 0) + message.n, self._num_bytes.get(client, 0) + num_bytes
        if requests > MAX_REQUESTS_PER_CLIENT or self._all_requests + message.n > MAX_REQUESTS:
            return (
                f"too many requests at this engine at once: at most {MAX_REQUESTS_PER_CLIENT} of a client "
                f"and {MAX_REQUESTS} of all together"
            )
        if taken > MAX_BYTES_PER_CLIENT or self._all_bytes + num_bytes > MAX_BYTES:
            return (
                f"the requests at this engine take too much memory: at most {MAX_BYTES_PER_CLIENT} bytes of a client "
                f"and {MAX_BYTES} of all together"
            )
        return None

    def take(self, request: Request) -> None:
        client = request.client
        request.num_bytes = _size(request.token_ids.nbytes, request.sampling)
        self._num_requests[client] = self._num_requests.get(client, 0) + 1
        self._num_bytes[client] = self._num_bytes.get(client, 0) + request.num_bytes
        self._all_requests += 1
        self._all_bytes += request.num_bytes

    def give_back(self, request: Request) -> None:
        client = request.client
        self._all_requests -= 1
        self._all_bytes -= request.num_bytes
        self._num_requests[client] -= 1
        self._num_bytes[client] -= request.num_bytes
        if not self._num_requests[client]:
            del self._num_requests[client], self._num_bytes[client]


def _size(token_bytes: int, sampling: Sampling) -> int:
    words = sampling.bad_words_token_ids
    entries = len(sampling.stop_token_ids) + len(sampling.logit_bias) + len(words) + sum(map(len, words))
    return token_bytes + _REQUEST_BYTES + _ENTRY_BYTES * entries
