"""The sum of all ranks' tensors in one launch, over memory that the GPUs of one host share.

Each program exchanges one part of the tensor with the same program of every other rank, and with nobody else: it writes
its part into the slot that every other rank keeps for it, raises its flag there, waits until all flags are raised at
home, and adds up what lies there, in the order of ranks, so that all ranks get the same bits. What is written to a peer
is on its way while the writer goes on; a read from one would be waited for. Slots alternate: one is written again two
exchanges later, and by then the writer has seen the flags of the exchange between, which the others raised after they
had read.

Flags count up. Who sets them to ABORTED ends every wait; the sums are of no meaning then.
"""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PART_BYTES = 8192
"""Of a tensor, that one program exchanges."""

ABORTED = 1 << 62


@triton.jit
def _sum_kernel(
    x,
    out,
    size,
    buffers,
    counts,
    rank,
    ranks: tl.constexpr,
    parts_max: tl.constexpr,
    slot_bytes: tl.constexpr,
    block: tl.constexpr,
):
    part = tl.program_id(0)
    number = tl.load(counts + part) + 1
    at = part * block + tl.arange(0, block)
    wanted = at < size
    mine = tl.load(x + at, mask=wanted)
    slots = ranks * parts_max * 8 + (number % 2) * (ranks * slot_bytes)
    for peer in tl.static_range(ranks):
        if peer != rank:
            slot = (tl.load(buffers + peer) + slots + rank * slot_bytes).to(x.dtype)
            # Without the hint it would be written element by element.
            tl.store(tl.multiple_of(slot + at, 16), mine, mask=wanted)
    # All of the part is written before any flag is raised.
    tl.debug_barrier()
    for peer in tl.static_range(ranks):
        if peer != rank:
            flags = tl.load(buffers + peer).to(tl.pointer_type(tl.int64))
            # Not a store: ABORTED stays.
            tl.atomic_max(flags + rank * parts_max + part, number, sem="release", scope="sys")
    own = tl.load(buffers + rank)
    flags = own.to(tl.pointer_type(tl.int64))
    for peer in tl.static_range(ranks):
        if peer != rank:
            while tl.atomic_add(flags + peer * parts_max + part, 0, sem="acquire", scope="sys") < number:
                pass
    tl.debug_barrier()
    total = tl.zeros((block,), dtype=tl.float32)
    for peer in tl.static_range(ranks):
        if peer == rank:
            total += mine.to(tl.float32)
        else:
            slot = (own + slots + peer * slot_bytes).to(x.dtype)
            # Past the first-level cache, which does not see what others write.
            theirs = tl.load(tl.multiple_of(slot + at, 16), mask=wanted, other=0, cache_modifier=".cg")
            total += theirs.to(tl.float32)
    tl.store(out + at, total.to(x.dtype.element_ty), mask=wanted)
    tl.store(counts + part, number)


def sum_over_ranks(x: Tensor, buffers_R: Tensor, counts: Tensor, rank: int, slot_bytes: int) -> Tensor:
    """The sum of every rank's `x` (contiguous, at most `slot_bytes`), in float32 and rounded once.

    `buffers_R`: addresses, on this device, of each rank's flags and slots (`buffer_bytes`). `counts`: exchanges that
    each part has made, int64.
    """
    out = torch.empty_like(x)
    block = PART_BYTES // x.element_size()
    parts = triton.cdiv(x.numel(), block)
    if parts:
        _sum_kernel[(parts,)](
            x, out, x.numel(), buffers_R, counts, rank, len(buffers_R), len(counts), slot_bytes, block, num_warps=8
        )
    return out


def buffer_bytes(ranks: int, parts: int, slot_bytes: int) -> int:
    """Size of a rank's flags, one a rank and part, and behind them its slots, two a rank."""
    return ranks * parts * 8 + 2 * ranks * slot_bytes
