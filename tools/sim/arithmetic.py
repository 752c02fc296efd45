"""A model without arithmetic: each cached position holds a digest of all tokens up to it, and the next token is a
function of the digest before it. Reading a wrong, stale or foreign position therefore shows at once."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

VOCABULARY = 50
EOS = 0
POISON = VOCABULARY - 1
"""A prompt that begins with it kills whatever engine computes it."""


def next_token(digest: bytes, seed: int) -> int:
    """What a sequence goes on with: never POISON."""
    return (digest[0] * 31 + digest[1] + seed) % (VOCABULARY - 1)


def extend(digest: bytes, token: int) -> bytes:
    return hashlib.blake2b(digest + token.to_bytes(4, "little"), digest_size=8).digest()


def digest_of(tokens: Iterable[int]) -> bytes:
    digest = b""
    for token in tokens:
        digest = extend(digest, token)
    return digest


def reference(prompt: array[int], seed: int, tokens_max: int, *, ignore_eos: bool) -> list[int]:
    """What the undisturbed run of a choice gives."""
    digest, out = digest_of(prompt), list[int]()
    while len(out) < tokens_max:
        out.append(next_token(digest, seed))
        if out[-1] == EOS and not ignore_eos:
            break
        digest = extend(digest, out[-1])
    return out


class PagedMemory:
    """The KV cache: a digest a position, by block."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._cells = [[b""] * block_tokens for _ in range(blocks)]

    def read(self, table: list[int], position: int) -> bytes:
        block, offset = divmod(position, self._block_tokens)
        digest = self._cells[table[block]][offset]
        assert digest, "a position is read before it was computed"
        return digest

    def write(self, table: list[int], position: int, digest: bytes) -> None:
        block, offset = divmod(position, self._block_tokens)
        self._cells[table[block]][offset] = digest
