"""One step of the engine, as arrays: what every rank of a replica runs. Pure.

The driver makes a plan (scheduler.py) and sends it to its peers; all ranks execute the same one. Entries run in
parallel columns, packed u32 (packing.py). An entry is a run of consecutive tokens of one sequence: a decode is a run of
one, a chunk of a prefill a longer one.
"""

from __future__ import annotations

import msgspec

from controlplane.runtime.packing import pack_u32, unpack_u32

NO_FEEDBACK = 0xFFFFFFFF


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """Columns have one item an entry, but `tokens` (one a token to compute) and `tables` (as `table_lengths` says)."""

    number: int
    sequences: bytes
    # Position of the entry's first token, and number of its tokens.
    starts: bytes
    counts: bytes
    # The entry's tokens, one after the other.
    tokens: bytes
    # Blocks that hold the sequence's positions from 0 to start + count - 1.
    table_lengths: bytes
    tables: bytes
    # Logits wanted: of the entry's last n tokens; 0 for a chunk that ends before its prompt does.
    logit_counts: bytes
    # 1: a token is sampled from the last of these logits.
    samples: bytes
    # Whole length that the request may reach: long-context rotary tables are chosen by it.
    rope_lengths: bytes
    # NO_FEEDBACK, or the entry of the step before whose sampled token, still on the device, is this entry's only one.
    feedback: bytes
    # Blocks to zero before the step: a sequence left values in them that are no numbers.
    scrub: bytes = b""


def written_blocks(plan: StepPlan, block_tokens: int) -> list[int]:
    """The blocks in which the step stores keys and values."""
    tables, offset, written = unpack_u32(plan.tables), 0, list[int]()
    columns = unpack_u32(plan.starts), unpack_u32(plan.table_lengths)
    for start, length in zip(*columns, strict=True):
        written += tables[offset + start // block_tokens : offset + length]
        offset += length
    return written


def probe_plan(tokens: int, block_tokens: int) -> StepPlan:
    """A step to measure with: the prompt of one sequence, in the first blocks."""
    blocks = -(-tokens // block_tokens)
    return StepPlan(
        number=0,
        sequences=pack_u32([0]),
        starts=pack_u32([0]),
        counts=pack_u32([tokens]),
        tokens=pack_u32([0] * tokens),
        table_lengths=pack_u32([blocks]),
        tables=pack_u32(range(blocks)),
        logit_counts=pack_u32([1]),
        samples=pack_u32([0]),
        rope_lengths=pack_u32([tokens]),
        feedback=pack_u32([NO_FEEDBACK]),
    )
