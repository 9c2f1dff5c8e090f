"""Which engine knows the past of a request: sessions by their name, prompts by what they begin with. No I/O."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

CHUNK_TOKENS = 64
_CHUNK_BYTES = 4 * CHUNK_TOKENS
_MAX_SESSIONS = 65_536
_MAX_CHUNKS = 16_384  # per engine: a million tokens


def prefix_hashes(token_ids: array[int]) -> tuple[int, ...]:
    """One hash per full chunk of a prompt, each of all tokens up to its chunk's end. token_ids: int32.

    Of this process only: Python salts the hash of bytes. Two prompts with the same hash cost a cache miss, no more.
    """
    data = token_ids.tobytes()
    hashes = []
    parent = 0
    for start in range(0, len(data) - _CHUNK_BYTES + 1, _CHUNK_BYTES):
        parent = hash((parent, data[start : start + _CHUNK_BYTES]))
        hashes.append(parent)
    return tuple(hashes)


class SessionTable:
    """The engine of each session; of the many, those used last."""

    def __init__(self) -> None:
        self._homes: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def home(self, session: str) -> int | None:
        """The engine that the session's newest request was sent to, if that is known."""
        return self._homes.get(session)

    def settle(self, session: str, engine_id: int) -> None:
        """The session's newest request goes to this engine."""
        self._homes[session] = engine_id
        self._homes.move_to_end(session)
        if len(self._homes) > _MAX_SESSIONS:
            self._homes.popitem(last=False)

    def forget(self, engine_id: int) -> None:
        """The engine is gone, and with it what it knew."""
        for session in [session for session, home in self._homes.items() if home == engine_id]:
            del self._homes[session]


class PrefixTable:
    """The prompt beginnings that each engine has computed; of the many, those used last, as in the engine's own cache.

    ::

        hashes = prefix_hashes(token_ids)
        table.cached_tokens(hashes)         # {1: 128}: engine 1 has computed the first two chunks
        table.computed(engine_id, hashes)   # the first token came from there
    """

    def __init__(self) -> None:
        self._chunks: dict[int, OrderedDict[int, None]] = {}

    def num_chunks(self, engine_id: int) -> int:
        """How many chunks are known of an engine."""
        return len(self._chunks.get(engine_id, ()))

    def computed(self, engine_id: int, hashes: Sequence[int]) -> None:
        """The engine has computed a prompt with these hashes. Not to be said of one that was merely sent there: then
        all of a burst would follow the first of it."""
        chunks = self._chunks.setdefault(engine_id, OrderedDict())
        for chunk in reversed(hashes):  # a beginning outlives what follows it
            chunks[chunk] = None
            chunks.move_to_end(chunk)
        while len(chunks) > _MAX_CHUNKS:
            chunks.popitem(last=False)

    def cached_tokens(self, hashes: Sequence[int]) -> dict[int, int]:
        """How many of a prompt's first tokens each engine has computed before; without those that have none."""
        cached = {}
        for engine_id, chunks in self._chunks.items():
            count = 0
            for chunk in hashes:
                if chunk not in chunks:
                    break
                count += 1
            if count:
                cached[engine_id] = count * CHUNK_TOKENS
        return cached

    def forget(self, engine_id: int) -> None:
        """The engine is gone, and with it what it knew."""
        self._chunks.pop(engine_id, None)
