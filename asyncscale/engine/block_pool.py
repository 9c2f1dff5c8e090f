"""The paged KV cache's bookkeeping: which block is whose, and what full blocks hold."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_ROOT = bytes(32)


def block_digest(parent: bytes | None, token_ids: bytes) -> bytes:
    """Digest of a full block's tokens and, through `parent`, of all that come before it in the sequence.

    A cryptographic hash, because one client's tokens must never be answered from another's cache by collision.
    """
    return blake2b((parent or _ROOT) + token_ids, digest_size=32).digest()


class BlockPool:
    """Reference-counted KV-cache blocks, and the prefix cache over the full ones.

    ::

        blocks = pool.lookup(digests)           # longest cached prefix
        pool.touch(blocks)                      # one more owner each
        blocks += pool.allocate(2)
        pool.cache(blocks[-1], digest)          # its tokens are computed
        pool.free(reversed(blocks))             # the end of a sequence is evicted before its beginning

    A block is referenced, or idle (no owner, but cached content: evicted least recently used first), or empty.
    Empty blocks are given out first, the most recently used first, so that untouched memory stays untouched.
    Freeing a block that has no owner, or is none of the pool's, raises RuntimeError: a bug, never a user's error.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._empty = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now: empty and idle ones."""
        return len(self._empty) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found by `lookup`, with or without owners."""
        return len(self._block_of)

    def allocate(self, num_blocks: int) -> list[int]:
        """Blocks with one owner each and no content. Raises RuntimeError when fewer are free."""
        if num_blocks > self.num_free:
            raise RuntimeError(f"{num_blocks} blocks asked of a pool with {self.num_free} free ones")
        while len(self._empty) < num_blocks:
            self._evict()
        start = len(self._empty) - num_blocks
        blocks = self._empty[start:]
        del self._empty[start:]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def can_allocate(self, num_blocks: int, touching: Iterable[int] = ()) -> bool:
        """Whether `touch(touching)` would leave `num_blocks` to allocate."""
        return num_blocks + sum(self._ref_counts[block] == 0 for block in touching) <= self.num_free

    def touch(self, blocks: Iterable[int]) -> None:
        """One more owner for each of these cached blocks."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._idle[block]
            self._ref_counts[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """One owner less for each; those given first are evicted first."""
        for block in blocks:
            if not 0 <= block < self.num_blocks or self._ref_counts[block] == 0:
                raise RuntimeError(f"block {block} freed, but nobody owns it")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._digests[block] is None:
                    self._empty.append(block)
                else:
                    self._idle[block] = None

    def cache(self, block: int, digest: bytes) -> None:
        """Let `lookup` find this referenced block's content. Nothing changes when another block has the same."""
        if self._digests[block] is None and self._block_of.setdefault(digest, block) == block:
            self._digests[block] = digest

    def lookup(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of a chain of digests."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def reset_cache(self) -> int:
        """Forget all cached content, owners keep their blocks. Returns how many blocks were forgotten."""
        num_cached = self.num_cached
        for block in self._block_of.values():
            self._digests[block] = None
        self._block_of.clear()
        self._empty.extend(self._idle)
        self._idle.clear()
        return num_cached

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        digest = self._digests[block]
        if digest is not None:
            del self._block_of[digest]
        self._digests[block] = None
        self._empty.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise RuntimeError unless every block is free once, or in as many `tables` as its reference count says."""
        owners = Counter(block for table in tables for block in table)
        free = Counter([*self._empty, *self._idle])
        for block in range(self.num_blocks):
            if owners[block] != self._ref_counts[block] or free[block] != (owners[block] == 0):
                raise RuntimeError(
                    f"block {block} is in {owners[block]} tables and {free[block]} times free, "
                    f"with {self._ref_counts[block]} references"
                )
            digest = self._digests[block]
            if (digest is None) == (block in self._idle) and not owners[block]:
                raise RuntimeError(f"block {block} is free, on the wrong list")
            if digest is not None and self._block_of.get(digest) != block:
                raise RuntimeError(f"block {block} is cached, but not found under its digest")
        if len(self._block_of) != sum(digest is not None for digest in self._digests):
            raise RuntimeError("the prefix cache has entries without a block")
        if (owners.keys() | free.keys()) - set(range(self.num_blocks)):
            raise RuntimeError("a table or a free list holds a block that is none of the pool's")
