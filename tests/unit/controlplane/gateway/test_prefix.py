"""Prefix hashes: equal for equal beginnings, apart for other tenants, few for long prompts."""

from __future__ import annotations

from array import array

from controlplane.gateway.prefix import HASHES_MAX, prefix_hashes
from controlplane.runtime.packing import pack_u32
from dataplane.engine.blocks import extend_chain, seed_hash

BLOCK = 16


def hashes(tokens: range | list[int], *, salt: str = "", fingerprint: str = "f") -> tuple[int, ...]:
    return prefix_hashes(pack_u32(tokens), BLOCK, salt=salt, fingerprint=fingerprint)


def test_one_hash_a_whole_block():
    assert len(hashes(range(BLOCK - 1))) == 0
    assert len(hashes(range(3 * BLOCK + 5))) == 3


def test_equal_beginnings_share_their_hashes_and_no_more():
    one, other = [*range(64), *range(100, 200)], [*range(64), *range(500, 600)]
    assert hashes(one)[:4] == hashes(other)[:4]
    assert not set(hashes(one)[4:]) & set(hashes(other)[4:])


def test_tenants_and_models_never_meet():
    every = [hashes(range(64)), hashes(range(64), salt="t"), hashes(range(64), fingerprint="g")]
    assert len({value for one in every for value in one}) == 3 * 4


def test_a_replicas_own_block_hashes_are_the_same():
    chain: list[bytes] = []
    extend_chain(chain, seed_hash("t", "f", ""), array("I", range(64)), BLOCK)
    assert hashes(range(64), salt="t") == tuple(int.from_bytes(link[:8], "little") for link in chain)


def test_long_prompts_have_few_hashes_at_places_that_do_not_depend_on_their_length():
    long, longer = hashes(range(60_000)), hashes(range(200_000))
    assert len(long) < len(longer) == HASHES_MAX
    assert longer[: len(long)] == long
