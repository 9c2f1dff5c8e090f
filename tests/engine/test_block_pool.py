from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncscale.engine.block_pool import BlockPool, block_digest


def digests(*contents: bytes) -> list[bytes]:
    chain: list[bytes] = []
    for content in contents:
        chain.append(block_digest(chain[-1] if chain else None, content))
    return chain


def test_blocks_are_given_out_once_until_freed():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert len(set(blocks)) == 3
    assert pool.num_free == 1
    with pytest.raises(RuntimeError, match="2 blocks asked of a pool with 1"):
        pool.allocate(2)
    pool.free(blocks)
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


def test_an_untouched_block_is_given_out_only_when_no_used_one_is_empty():
    pool = BlockPool(100)
    first = pool.allocate(2)
    pool.free(first)
    assert sorted(pool.allocate(2)) == sorted(first)


@pytest.mark.parametrize("block", [0, -1, 4])
def test_freeing_a_block_that_nobody_owns_raises(block):
    pool = BlockPool(4)
    with pytest.raises(RuntimeError, match="nobody owns it"):
        pool.free([block])


def test_a_shared_block_is_free_when_its_last_owner_lets_go():
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.cache(block, b"x")
    pool.touch([block])
    pool.free([block])
    assert pool.num_free == 0
    pool.free([block])
    assert pool.num_free == 1
    with pytest.raises(RuntimeError):
        pool.free([block])


def test_lookup_finds_the_longest_cached_prefix_and_no_block_after_a_gap():
    pool = BlockPool(3)
    chain = digests(b"a", b"b", b"c")
    blocks = pool.allocate(3)
    pool.cache(blocks[0], chain[0])
    pool.cache(blocks[2], chain[2])
    assert pool.lookup(chain) == blocks[:1]
    pool.cache(blocks[1], chain[1])
    assert pool.lookup(chain) == blocks


def test_the_same_tokens_after_another_prefix_are_another_content():
    assert digests(b"a", b"x")[1] != digests(b"b", b"x")[1]
    assert digests(b"a", b"x") == digests(b"a", b"x")


def test_the_block_least_recently_used_is_evicted_first_and_the_end_of_a_sequence_before_its_beginning():
    pool = BlockPool(4)
    old, new = digests(b"old 1", b"old 2"), digests(b"new 1", b"new 2")
    for chain in (old, new):
        blocks = pool.allocate(2)
        for block, digest in zip(blocks, chain, strict=True):
            pool.cache(block, digest)
        pool.free(reversed(blocks))
    reused = pool.lookup(old)
    pool.touch(reused)
    pool.free(reversed(reused))  # now the old ones were used last
    pool.allocate(1)
    assert (len(pool.lookup(old)), len(pool.lookup(new))) == (2, 1)
    pool.allocate(1)
    assert (len(pool.lookup(old)), len(pool.lookup(new))) == (2, 0)
    pool.allocate(1)
    assert len(pool.lookup(old)) == 1


def test_content_computed_twice_is_cached_once():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.cache(first, b"x")
    pool.cache(second, b"x")
    assert pool.lookup([b"x"]) == [first]
    pool.free([first, second])
    assert pool.num_cached == 1
    pool.check_integrity([])


def test_blocks_that_a_touch_would_take_cannot_be_allocated_as_well():
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    for block, digest in zip(blocks, (b"x", b"y"), strict=True):
        pool.cache(block, digest)
    pool.free(blocks[1:])
    assert pool.can_allocate(2)
    assert pool.can_allocate(2, touching=blocks[:1])  # owned already: takes nothing
    assert not pool.can_allocate(2, touching=blocks)


def test_reset_forgets_contents_but_takes_nobodys_block():
    pool = BlockPool(4)
    idle, owned = pool.allocate(2)
    pool.cache(idle, b"x")
    pool.cache(owned, b"y")
    pool.free([idle])
    assert pool.reset_cache() == 2
    assert pool.lookup([b"x"]) == pool.lookup([b"y"]) == []
    pool.check_integrity([[owned]])
    pool.free([owned])
    assert pool.num_free == 4


@pytest.mark.parametrize("tables", [[], [[0], [0]], [[0, 1]], [[1]]])
def test_the_audit_sees_a_table_that_does_not_match(tables):
    pool = BlockPool(3)
    assert pool.allocate(1) == [0]
    pool.check_integrity([[0]])
    with pytest.raises(RuntimeError):
        pool.check_integrity(tables)


class PoolMachine(RuleBasedStateMachine):
    """Sequences that come, share prefixes, grow and go."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(7)
        self.tables: list[list[int]] = []

    @rule(contents=st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=5), num_more=st.integers(0, 2))
    def come(self, contents, num_more):
        chain = digests(*contents)
        found = self.pool.lookup(chain)
        num_new = len(chain) - len(found) + num_more
        if not self.pool.can_allocate(num_new, touching=found):
            return
        self.pool.touch(found)
        table = found + self.pool.allocate(num_new)
        for block, digest in zip(table, chain, strict=False):
            self.pool.cache(block, digest)
        self.tables.append(table)

    @rule(index=st.integers(0, 10))
    def go(self, index):
        if self.tables:
            self.pool.free(reversed(self.tables.pop(index % len(self.tables))))

    @rule()
    def reset(self):
        self.pool.reset_cache()

    @invariant()
    def is_sound(self):
        self.pool.check_integrity(self.tables)
        assert self.pool.num_free == 7 - len({block for table in self.tables for block in table})


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
