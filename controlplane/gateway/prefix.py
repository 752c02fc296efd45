"""Hashes by which the leader finds the replica that computed a prompt's beginning before: a hint, no identity. Pure."""
# pyright: strict

from __future__ import annotations

from hashlib import blake2b

HASHES_MAX = 256
HASH_BYTES = 8
_CHAIN_BYTES = 16
_TOKEN_BYTES = 4
_EACH_UP_TO = 64
_PER_OCTAVE = 32


def prefix_hashes(prompt: bytes, block_tokens: int, *, salt: str, fingerprint: str) -> tuple[int, ...]:
    """64-bit hashes of the prompt's prefixes, shortest first, at most HASHES_MAX.

    `prompt` is packed u32. The chain is seeded as the replica's own block cache is (dataplane/engine/blocks.py), so
    that its digests tell what it holds of a prompt, and that tenants with different salts never meet. Every one of the
    first 64 whole blocks has its hash; beyond that 32 evenly spaced ones stand for each doubling, at places that do
    not depend on the prompt's length.
    """
    parts = [part.encode() for part in (salt, fingerprint, "")]
    joined = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    chain = blake2b(joined, digest_size=_CHAIN_BYTES).digest()
    block_bytes = block_tokens * _TOKEN_BYTES
    hashes: list[int] = []
    for block in range(len(prompt) // block_bytes):
        if len(hashes) == HASHES_MAX:
            break
        content = prompt[block * block_bytes : (block + 1) * block_bytes]
        chain = blake2b(chain + content, digest_size=_CHAIN_BYTES).digest()
        if _is_reported(block + 1):
            hashes.append(int.from_bytes(chain[:HASH_BYTES], "little"))
    return tuple(hashes)


def _is_reported(blocks: int) -> bool:
    if blocks <= _EACH_UP_TO:
        return True
    stride = (1 << (blocks - 1).bit_length()) // 2 // _PER_OCTAVE
    return blocks % stride == 0
