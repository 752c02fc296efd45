from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.engine.blocks import HASH_BYTES, BlockPool, extend_chain, seed_hash


class Pool(RuleBasedStateMachine):
    """Random users of a pool of eight blocks, each holding what it allocated or found."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8)
        self.held: list[list[int]] = []
        self.links = 0

    @rule(count=st.integers(1, 4))
    def allocate(self, count: int) -> None:
        if count <= self.pool.available:
            self.held.append(self.pool.allocate(count))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.held))))
        self.links += 1
        self.pool.publish(block, data.draw(st.sampled_from([b"same", b"%d" % self.links])))

    @rule()
    def share(self) -> None:
        found = self.pool.match(self.pool.newest(1), 1)
        if found:
            self.pool.acquire(found)
            self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.pool.forget(data.draw(st.sampled_from(data.draw(st.sampled_from(self.held)))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def books_agree(self) -> None:
        self.pool.check(block for blocks in self.held for block in blocks)
        assert self.pool.available == 8 - len({block for blocks in self.held for block in blocks})


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def _published(pool: BlockPool, *links: bytes) -> list[int]:
    blocks = pool.allocate(len(links))
    for block, link in zip(blocks, links, strict=True):
        pool.publish(block, link)
    return blocks


def test_least_recently_used_prefix_is_evicted_from_its_end() -> None:
    pool = BlockPool(4)
    first, second = _published(pool, b"a", b"b"), _published(pool, b"c", b"d")
    pool.release(first)
    pool.release(second)
    pool.acquire(first)
    pool.release(first)
    pool.allocate(1)
    assert pool.match([b"c", b"d"], 2) == second[:1]
    pool.allocate(1)
    assert pool.match([b"c"], 1) == []
    assert pool.match([b"a", b"b"], 2) == first


def test_match_stops_at_the_first_gap() -> None:
    pool = BlockPool(4)
    blocks = _published(pool, b"a", b"c")
    assert pool.match([b"a", b"b", b"c"], 3) == blocks[:1]
    assert pool.match([b"a"], 0) == []


def test_equal_content_is_published_once() -> None:
    pool = BlockPool(2)
    first, second = _published(pool, b"a"), _published(pool, b"a")
    assert pool.match([b"a"], 1) == first
    pool.release(second)
    assert pool.available == 1


def test_double_release_is_a_broken_invariant() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(blocks)


def test_chain_covers_everything_before_it() -> None:
    seed = seed_hash("salt", "model")
    chain: list[bytes] = []
    extend_chain(chain, seed, array("I", range(8)), 4)
    assert [len(link) for link in chain] == [HASH_BYTES] * 2
    grown = list(chain[:1])
    extend_chain(grown, seed, array("I", range(11)), 4)
    assert grown == chain
    other: list[bytes] = []
    extend_chain(other, seed, array("I", [9, 1, 2, 3, 4, 5, 6, 7]), 4)
    assert not set(other) & set(chain)


def test_chains_of_different_seeds_never_meet() -> None:
    seeds = {seed_hash(*parts) for parts in (("a", "b"), ("ab", ""), ("", "ab"), ("a", "c"), ("a",))}
    assert len(seeds) == 5
