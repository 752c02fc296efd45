"""Attention of single tokens over the paged cache, split along the cached positions (FlashDecoding, arXiv:2311.01282).

The host cuts a step's work into items: a run of positions of one token's sequence, for all heads of a KV head at once.
An item that is its token's only one writes the result; of several, each writes a part, and a second launch merges them.

A cache of 8-bit floats (E4M3) has an exponent for each position and head, by which its values are to be multiplied as a
power of two: no value is out of range, and no model has to be calibrated (OCP Microscaling formats 1.0).

Shape letters: T tokens, H query heads, K KV heads, D head size, L positions of a block.
"""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dataplane.kernels.early import is_early, options

ITEM = 8
"""Columns of an item: token row (below 0: nothing to do), first entry in the block tables, first position, end, part
(below 0: the only one)."""

MERGE = 4
"""Columns of a merge: token row (below 0: nothing to do), first part, number of parts, from one part to the next."""

Exponents = tuple[Tensor, Tensor]
"""Of keys and of values, int8, one a position and head: (B, K · L)."""

_LOG2E = 1.4426950408889634


@triton.jit
def _weights(score, scale, cap, capped: tl.constexpr):
    """Scores for base 2 exponentials."""
    if capped:
        return (cap * (2.0 * tl.sigmoid(2.0 * score * scale / cap) - 1.0)) * 1.4426950408889634
    return score * (scale * 1.4426950408889634)


@triton.jit
def _powers(exponents, place, inside):
    """2 to the exponents there, by their bits."""
    exponent = tl.load(exponents + place, mask=inside, other=0).to(tl.int32)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _decode_kernel(
    q, q_stride, k_cache, v_cache, k_exponents, v_exponents, tables, items, out, part_out, part_log, sinks, scale, cap,
    heads, kv_heads, group: tl.constexpr,
    width: tl.constexpr, v_width: tl.constexpr, page: tl.constexpr, capped: tl.constexpr, sinking: tl.constexpr,
    scaled: tl.constexpr, precision: tl.constexpr, block_g: tl.constexpr, block_n: tl.constexpr,
    block_d: tl.constexpr, block_v: tl.constexpr, stages: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0)
    item = items + tl.program_id(1) * 8
    row = tl.load(item).to(tl.int64)
    if row >= 0:
        table = tables + tl.load(item + 1)
        begin = tl.load(item + 2)
        end = tl.load(item + 3)
        part = tl.load(item + 4).to(tl.int64)
        g, n, d, e = tl.arange(0, block_g), tl.arange(0, block_n), tl.arange(0, block_d), tl.arange(0, block_v)
        head = kv_head * group + g
        here = g < group
        q_GD = tl.load(
            q + row * q_stride + head[:, None] * width + d[None, :],
            mask=here[:, None] & (d < width)[None, :],
            other=0.0,
        )
        top = tl.full([block_g], float("-inf"), tl.float32)
        total = tl.zeros([block_g], tl.float32)
        acc = tl.zeros([block_g, block_v], tl.float32)
        for start in tl.range(begin, end, block_n, num_stages=stages):
            position = start + n
            seen = position < end
            block = tl.load(table + position // page, mask=seen, other=0).to(tl.int64)
            place = (block * kv_heads + kv_head) * page + position % page
            k_DN = tl.load(
                k_cache + place[None, :] * width + d[:, None], mask=seen[None, :] & (d < width)[:, None], other=0.0
            )
            product = tl.dot(q_GD, k_DN.to(q_GD.dtype), input_precision=precision)
            if scaled:
                product = product * _powers(k_exponents, place, seen)[None, :]
            score = _weights(product, scale, cap, capped)
            score = tl.where(seen[None, :], score, float("-inf"))
            now = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - now[:, None])
            fade = tl.exp2(top - now)
            total = total * fade + tl.sum(weight, 1)
            v_NE = tl.load(
                v_cache + place[:, None] * v_width + e[None, :], mask=seen[:, None] & (e < v_width)[None, :], other=0.0
            )
            if scaled:
                weight = weight * _powers(v_exponents, place, seen)[None, :]
            acc = tl.dot(weight.to(q_GD.dtype), v_NE.to(q_GD.dtype), acc * fade[:, None], input_precision=precision)
            top = now
        if part < 0:
            if sinking:
                sink = tl.load(sinks + head, mask=here, other=0.0).to(tl.float32) * 1.4426950408889634
                now = tl.maximum(top, sink)
                fade = tl.exp2(top - now)
                total = total * fade + tl.exp2(sink - now)
                acc = acc * fade[:, None]
            # A row that only fills a batch up has no positions, and gets zeros.
            result = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(
                out + (row * heads + head[:, None]) * v_width + e[None, :],
                result.to(out.dtype.element_ty),
                mask=here[:, None] & (e < v_width)[None, :],
            )
        else:
            tl.store(
                part_out + (part * heads + head[:, None]) * v_width + e[None, :],
                acc / total[:, None],
                mask=here[:, None] & (e < v_width)[None, :],
            )
            tl.store(part_log + part * heads + head, top + tl.log2(total), mask=here)


@triton.jit
def _merge_kernel(
    merges, part_out, part_log, out, sinks, heads, v_width: tl.constexpr, sinking: tl.constexpr, block_v: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    merge = merges + tl.program_id(1) * 4
    row = tl.load(merge).to(tl.int64)
    if row >= 0:
        first = tl.load(merge + 1).to(tl.int64)
        count = tl.load(merge + 2)
        step = tl.load(merge + 3)
        e = tl.arange(0, block_v)
        top = tl.load(part_log + first * heads + head)
        for index in range(1, count):
            top = tl.maximum(top, tl.load(part_log + (first + index * step) * heads + head))
        total = 0.0
        if sinking:
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            top = tl.maximum(top, sink)
            total += tl.exp2(sink - top)
        acc = tl.zeros([block_v], tl.float32)
        for index in range(count):
            weight = tl.exp2(tl.load(part_log + (first + index * step) * heads + head) - top)
            value = tl.load(
                part_out + ((first + index * step) * heads + head) * v_width + e, mask=e < v_width, other=0.0
            )
            acc += weight * value
            total += weight
        tl.store(out + (row * heads + head) * v_width + e, (acc / total).to(out.dtype.element_ty), mask=e < v_width)


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a program reads the cache: positions at a time, warps, and stages of the software pipeline."""

    positions: int
    warps: int
    stages: int


USUAL, MIDDLE = Tuning(128, 4, 3), Tuning(64, 2, 4)
"""The middle one from MIDDLE_PROGRAMS[0] to [1] tokens times KV heads, where sequences are cut into parts: the best or
nearly so, on an H100, of equal and of ragged lengths."""

MIDDLE_PROGRAMS = (16, 512)

NARROW = Tuning(32, 4, 3)
"""For wide heads and for single precision."""


def padded(width: int) -> int:
    """The side of a matrix that a tensor core takes."""
    return max(triton.next_power_of_2(width), 16)


def decode(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    items: Tensor,
    merges: Tensor,
    out_THD: Tensor,
    kv_heads: int,
    block_tokens: int,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    exponents: Exponents | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Fill the rows of `out_THD` that `items` (I, ITEM) and `merges` (M, MERGE) name, int32 both.

    `tables`: int32 block numbers of all sequences, one behind the other. Parts are numbered below I.
    """
    heads, width = q_THD.shape[1:]
    v_width = out_THD.shape[2]
    group = heads // kv_heads
    if not len(items):
        return
    merged = len(merges) > 0
    parts = len(items) if merged else 1
    part_out = torch.empty(parts, heads, v_width, dtype=torch.float32, device=q_THD.device)
    part_log = torch.empty(parts, heads, dtype=torch.float32, device=q_THD.device)
    sinks = sinks_H if sinks_H is not None else part_log
    k_exponents, v_exponents = exponents if exponents is not None else (items, items)
    exact = q_THD.dtype == torch.float32
    if tuning is None:
        middle = MIDDLE_PROGRAMS[0] <= len(q_THD) * kv_heads <= MIDDLE_PROGRAMS[1]
        tuning = NARROW if exact or max(width, v_width) > 128 else MIDDLE if middle else USUAL
    _decode_kernel[(kv_heads, len(items))](
        q_THD, q_THD.stride(0), k_cache, v_cache, k_exponents, v_exponents, tables, items, out_THD, part_out, part_log,
        sinks, scale, softcap or 1.0, heads, kv_heads, group, width, v_width, block_tokens, softcap is not None,
        sinks_H is not None, exponents is not None, "ieee" if exact else "tf32", padded(group),
        tuning.positions, padded(width), padded(v_width), 1 if exact else tuning.stages, is_early(),
        num_warps=tuning.warps, **options(),
    )  # fmt: skip
    if merged:
        merge(merges, part_out, part_log, out_THD, sinks_H)


def merge(merges: Tensor, part_out: Tensor, part_log: Tensor, out_THD: Tensor, sinks_H: Tensor | None) -> None:
    """Fill the rows of `out_THD` that `merges` name from parts: means (P, H, D) and logarithms of weights (P, H)."""
    heads, v_width = out_THD.shape[1:]
    _merge_kernel[(heads, len(merges))](
        merges, part_out, part_log, out_THD, part_log if sinks_H is None else sinks_H, heads, v_width,
        sinks_H is not None, padded(v_width), is_early(), num_warps=1, **options(),
    )  # fmt: skip
