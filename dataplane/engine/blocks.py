"""The paged KV cache's blocks: who holds which, and which hold a known prefix.

Pure. A block is `block_tokens` consecutive positions of one sequence, over all layers. Blocks are counted by
reference; a block whose tokens are known and computed may be *published* under the hash of everything up to
its end, so that others with the same prefix take it instead of computing it (vLLM's prefix cache). A published
block that nobody holds stays; the least recently used goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from itertools import islice

from controlplane.runtime.packing import pack_u32

HASH_BYTES = 16


def seed_hash(*parts: str) -> bytes:
    """Start of a hash chain. Chains of different parts never meet, so a tenant neither sees nor times another's."""
    joined = b"".join(len(part.encode()).to_bytes(4, "little") + part.encode() for part in parts)
    return hashlib.blake2b(joined, digest_size=HASH_BYTES).digest()


def extend_chain(chain: list[bytes], seed: bytes, tokens: array[int], block_tokens: int) -> None:
    """Append to `chain` the hashes of the full blocks of `tokens` that it lacks; each covers all up to its end."""
    parent = chain[-1] if chain else seed
    for start in range(len(chain) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
        block = pack_u32(tokens[start : start + block_tokens])
        parent = hashlib.blake2b(parent + block, digest_size=HASH_BYTES).digest()
        chain.append(parent)


class BlockPool:
    """All blocks of one cache. Raises nothing: a caller asks `available` first; a breach is an assertion."""

    def __init__(self, total: int) -> None:
        self._references = [0] * total
        self._hash_of: list[bytes | None] = [None] * total
        # Oldest first; `newest` reads it from the end.
        self._published: dict[bytes, int] = {}
        # Last in, first out: memory never touched stays untouched as long as possible.
        self._free = list(range(total - 1, -1, -1))
        # Published, held by nobody; least recently used first.
        self._idle: dict[int, None] = {}

    @property
    def total(self) -> int:
        return len(self._references)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give now; published ones that nobody holds included."""
        return len(self._free) + len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each, evicting idle published ones if need be."""
        assert count <= self.available, "more blocks asked for than available"
        blocks: list[int] = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def match(self, chain: Sequence[bytes], limit: int) -> list[int]:
        """The published blocks of the longest known prefix of `chain`, at most `limit`. Takes no reference."""
        blocks: list[int] = []
        for link in islice(chain, limit):
            block = self._published.get(link)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def idle_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: acquiring them lowers `available` by as much."""
        return sum(block in self._idle for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference on each of these published blocks."""
        for block in blocks:
            self._idle.pop(block, None)
            self._references[block] += 1
            link = self._hash_of[block]
            assert link is not None, "only published blocks are shared"
            self._published[link] = self._published.pop(link)

    def publish(self, block: int, link: bytes) -> None:
        """Make a held block findable. Call it only after the step that computed its last token is done. The first of
        several equal blocks wins."""
        assert self._references[block] > 0, "a block that nobody holds cannot be published"
        if self._hash_of[block] is None and link not in self._published:
            self._hash_of[block] = link
            self._published[link] = block

    def is_published(self, link: bytes) -> bool:
        return link in self._published

    def forget(self, block: int) -> None:
        """Make a held block unfindable."""
        assert self._references[block] > 0, "a block that nobody holds cannot be forgotten"
        link = self._hash_of[block]
        if link is not None:
            self._hash_of[block] = None
            del self._published[link]

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference on each block of a sequence. The end of the prefix is evicted before its beginning."""
        for block in reversed(blocks):
            assert self._references[block] > 0, "block released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def newest(self, count: int) -> list[bytes]:
        """Hashes of the blocks published or used last, newest first."""
        return list(islice(reversed(self._published), count))

    def check(self, held: Iterable[int]) -> None:
        """Assert that the pool's books agree with `held`, all references that its users think they have."""
        counts = [0] * self.total
        for block in held:
            counts[block] += 1
        assert counts == self._references, "references differ from what sequences hold"
        unheld = [*self._free, *self._idle]
        assert len(set(unheld)) == len(unheld), "a block is free twice"
        assert {block for block, count in enumerate(counts) if count == 0} == set(unheld), "a block leaked"
        assert all(self._hash_of[block] is not None for block in self._idle), "an unpublished block lies idle"
        assert {link: block for block, link in enumerate(self._hash_of) if link is not None} == self._published, (
            "published blocks and their hashes differ"
        )

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        link = self._hash_of[block]
        assert link is not None, "an idle block is published"
        del self._published[link]
        self._hash_of[block] = None
        return block
