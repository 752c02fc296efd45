"""Causal attention of runs of tokens over the paged cache, their own keys and values being stored there already.

FlashAttention-2 (arXiv:2307.08691) over tiles that the host cuts: some queries of one sequence, for all heads of a KV
head at once. Prompts without and with a cached prefix, chunks, sliding windows and single tokens are the same to it.

Cut along the positions too (`prefill_split`), at constant multiples, its parts merged as those of decode.py are, it is
batch-invariant: a query meets the same blocks of positions in the same order whatever else its tile, its step and the
cache hold, and positions that others see add exact zeros.

Shape letters: T tokens, H query heads, K KV heads, D head size, L positions of a block.
"""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dataplane.kernels.decode import Exponents, Tuning, _powers, _weights, merge, padded

TILE = 8
"""Columns of a tile: row of its first query (below 0: nothing to do), number of queries, position of the first query
(below 0: rows that only fill a batch up, and get zeros), first entry in the block tables; of a split one also the first
position, the end, and the part of the first query (below 0: the only one)."""

ROWS, ROWS_SPLIT = 128, 64
"""Rows of a tile: queries times query heads a KV head, the latter rounded up to a power of two. Fewer of a split one,
which serves single tokens too."""


@triton.jit
def _keys_step(
    start, first, position_M, q_MD, top, total, acc, k_cache, v_cache, k_exponents, v_exponents, table, kv_head,
    kv_heads, scale, cap, window, end, width: tl.constexpr, v_width: tl.constexpr, page: tl.constexpr,
    capped: tl.constexpr, windowed: tl.constexpr, scaled: tl.constexpr, masked: tl.constexpr,
    precision: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr, block_v: tl.constexpr,
):  # fmt: skip
    n, d, e = tl.arange(0, block_n), tl.arange(0, block_d), tl.arange(0, block_v)
    position = start + n
    inside = position < end
    block = tl.load(table + position // page, mask=inside, other=0).to(tl.int64)
    place = (block * kv_heads + kv_head) * page + position % page
    k_DN = tl.load(
        k_cache + place[None, :] * width + d[:, None], mask=inside[None, :] & (d < width)[:, None], other=0.0
    )
    product = tl.dot(q_MD, k_DN.to(q_MD.dtype), input_precision=precision)
    if scaled:
        product = product * _powers(k_exponents, place, inside)[None, :]
    score = _weights(product, scale, cap, capped)
    if masked:
        seen = position[None, :] <= position_M[:, None]
        if windowed:
            seen = seen & (position[None, :] > position_M[:, None] - window)
        # Finite: a row that sees none of these positions then has weight 1 of nothing, which later ones fade to 0.
        score = tl.where(seen, score, -1.0e30)
    now = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - now[:, None])
    fade = tl.exp2(top - now)
    total = total * fade + tl.sum(weight, 1)
    v_NE = tl.load(
        v_cache + place[:, None] * v_width + e[None, :], mask=inside[:, None] & (e < v_width)[None, :], other=0.0
    )
    if scaled:
        weight = weight * _powers(v_exponents, place, inside)[None, :]
    acc = tl.dot(weight.to(q_MD.dtype), v_NE.to(q_MD.dtype), acc * fade[:, None], input_precision=precision)
    return now, total, acc


@triton.jit
def _prefill_kernel(
    q, q_stride, k_cache, v_cache, k_exponents, v_exponents, tables, tiles, out, part_out, part_log, sinks, scale, cap,
    window, heads, kv_heads, group: tl.constexpr, padded_group: tl.constexpr,
    width: tl.constexpr, v_width: tl.constexpr, page: tl.constexpr, capped: tl.constexpr, sinking: tl.constexpr,
    windowed: tl.constexpr, scaled: tl.constexpr, split: tl.constexpr, precision: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr, block_v: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 8
    row = tl.load(tile).to(tl.int64)
    if row >= 0:
        count = tl.load(tile + 1)
        first = tl.load(tile + 2)
        table = tables + tl.load(tile + 3)
        m, d, e = tl.arange(0, block_m), tl.arange(0, block_d), tl.arange(0, block_v)
        query = m // padded_group
        head = kv_head * group + m % padded_group
        here = (query < count) & (m % padded_group < group)
        q_MD = tl.load(
            q + (row + query)[:, None] * q_stride + head[:, None] * width + d[None, :],
            mask=here[:, None] & (d < width)[None, :],
            other=0.0,
        )
        position_M = first + query
        top = tl.full([block_m], -1.0e30, tl.float32)
        total = tl.zeros([block_m], tl.float32)
        acc = tl.zeros([block_m, block_v], tl.float32)
        # Rows that only fill a batch up: first < 0, so no position is before the end.
        end = tl.where(first < 0, 0, first + count)
        begin = 0
        clear = (first + 1) // block_n * block_n
        if windowed:
            begin = tl.maximum(first - window + 1, 0) // block_n * block_n
            clear = begin
        if split:
            begin = tl.maximum(begin, tl.load(tile + 4))
            end = tl.minimum(end, tl.load(tile + 5))
            # All positions alike: where the first query of the tile stands must not matter to the others.
            clear = begin
        for start in tl.range(begin, clear, block_n, num_stages=stages):
            top, total, acc = _keys_step(
                start, first, position_M, q_MD, top, total, acc, k_cache, v_cache, k_exponents, v_exponents, table,
                kv_head, kv_heads, scale, cap, window, end, width, v_width, page, capped, windowed, scaled, False,
                precision, block_n, block_d, block_v,
            )  # fmt: skip
        for start in tl.range(tl.maximum(clear, begin), end, block_n, num_stages=stages):
            top, total, acc = _keys_step(
                start, first, position_M, q_MD, top, total, acc, k_cache, v_cache, k_exponents, v_exponents, table,
                kv_head, kv_heads, scale, cap, window, end, width, v_width, page, capped, windowed, scaled, True,
                precision, block_n, block_d, block_v,
            )  # fmt: skip
        part = tl.load(tile + 6).to(tl.int64) if split else -1
        if part < 0:
            if sinking:
                sink = tl.load(sinks + head, mask=here, other=0.0).to(tl.float32) * 1.4426950408889634
                now = tl.maximum(top, sink)
                fade = tl.exp2(top - now)
                total = total * fade + tl.exp2(sink - now)
                acc = acc * fade[:, None]
            result = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(
                out + ((row + query)[:, None] * heads + head[:, None]) * v_width + e[None, :],
                result.to(out.dtype.element_ty),
                mask=here[:, None] & (e < v_width)[None, :],
            )
        else:
            place = (part + query) * heads + head
            tl.store(
                part_out + place[:, None] * v_width + e[None, :],
                acc / total[:, None],
                mask=here[:, None] & (e < v_width)[None, :],
            )
            tl.store(part_log + place, top + tl.log2(total), mask=here)


USUAL, NARROW = Tuning(32, 4, 4), Tuning(32, 8, 2)
"""The narrow one for wide heads and for single precision, which fill the registers."""

SPLIT = Tuning(64, 4, 2)
"""Of split tiles of usual width. Their positions divide SPLIT_TOKENS (dataplane/engine/splits.py)."""


def queries_a_tile(heads_per_kv: int, rows: int = ROWS) -> int:
    """Queries that one tile holds."""
    return max(rows // triton.next_power_of_2(heads_per_kv), 1)


def prefill(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    tiles: Tensor,
    out_THD: Tensor,
    kv_heads: int,
    block_tokens: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    exponents: Exponents | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Fill the rows of `out_THD` that `tiles` (N, TILE) int32 name. `tables` as for `decode`."""
    if len(tiles):
        tuning = tuning or (NARROW if _is_wide(q_THD, out_THD) else USUAL)
        _launch(
            q_THD, k_cache, v_cache, tables, tiles, out_THD, None, kv_heads, block_tokens, scale, window, softcap,
            sinks_H, exponents, tuning,
        )  # fmt: skip


def prefill_split(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    tiles: Tensor,
    merges: Tensor,
    parts: int,
    out_THD: Tensor,
    kv_heads: int,
    block_tokens: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    exponents: Exponents | None = None,
) -> None:
    """As `prefill`, of tiles cut along the positions into at most `parts` parts, which `merges` (M, 4) put together."""
    if not len(tiles):
        return
    heads, v_width = out_THD.shape[1:]
    part_out = torch.empty(max(parts, 1), heads, v_width, dtype=torch.float32, device=q_THD.device)
    part_log = torch.empty(max(parts, 1), heads, dtype=torch.float32, device=q_THD.device)
    _launch(
        q_THD, k_cache, v_cache, tables, tiles, out_THD, (part_out, part_log), kv_heads, block_tokens, scale, window,
        softcap, sinks_H, exponents, NARROW if _is_wide(q_THD, out_THD) else SPLIT,
    )  # fmt: skip
    if len(merges):
        merge(merges, part_out, part_log, out_THD, sinks_H)


def _is_wide(q_THD: Tensor, out_THD: Tensor) -> bool:
    return q_THD.dtype == torch.float32 or max(q_THD.shape[2], out_THD.shape[2]) > 128


def _launch(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, tiles: Tensor, out_THD: Tensor,
    parts: tuple[Tensor, Tensor] | None, kv_heads: int, block_tokens: int, scale: float, window: int | None,
    softcap: float | None, sinks_H: Tensor | None, exponents: Exponents | None, tuning: Tuning,
) -> None:  # fmt: skip
    heads, width = q_THD.shape[1:]
    v_width = out_THD.shape[2]
    group = heads // kv_heads
    padded_group = triton.next_power_of_2(group)
    single = q_THD.dtype == torch.float32
    part_out, part_log = parts if parts is not None else (out_THD, out_THD)
    k_exponents, v_exponents = exponents if exponents is not None else (tiles, tiles)
    _prefill_kernel[(kv_heads, len(tiles))](
        q_THD, q_THD.stride(0), k_cache, v_cache, k_exponents, v_exponents, tables, tiles, out_THD, part_out, part_log,
        sinks_H if sinks_H is not None else tiles, scale, softcap or 1.0, window or 0, heads, kv_heads, group,
        padded_group, width, v_width, block_tokens, softcap is not None, sinks_H is not None, window is not None,
        exponents is not None, parts is not None, "ieee" if single else "tf32",
        queries_a_tile(group, ROWS if parts is None else ROWS_SPLIT) * padded_group,
        tuning.positions, padded(width), padded(v_width), 1 if single else tuning.stages, num_warps=tuning.warps,
    )  # fmt: skip
