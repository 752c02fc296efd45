"""Queries and keys normed per head and rotated, keys and values stored in the paged cache: one launch.

The cache holds a block as (K, L, D): the positions of one head lie together. One of 8-bit floats gets each head's
values over a power of two that brings the largest near the top of their range.

Shape letters: T tokens, H query heads, K KV heads, D head size, R rotated dimensions, L positions of a block.
"""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dataplane.kernels.decode import Exponents
from dataplane.kernels.early import is_early, options
from dataplane.kernels.norm import _scaled

NONE, HALVES, PAIRS = 0, 1, 2
"""No rotation; dimension d turns with d + R/2; d turns with its neighbour."""

_HEADS = 8


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """An RMS norm of each head."""

    weight_D: Tensor
    epsilon: float
    # As in norm.py.
    kind: int


@triton.jit
def _rows(x, row_stride, row, head, heads, width: tl.constexpr, block: tl.constexpr, dim):
    return tl.load(
        x + row * row_stride + head[:, None] * width + dim[None, :],
        mask=(head < heads)[:, None] & (dim < width)[None, :],
        other=0.0,
    )


@triton.jit
def _turned(
    x, row_stride, row, head, heads, cos, sin, weight, epsilon,
    width: tl.constexpr, rotated: tl.constexpr, columns: tl.constexpr, layout: tl.constexpr,
    norm: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Heads `head` of a row as (heads, block) float32."""
    dim = tl.arange(0, block)
    raw = _rows(x, row_stride, row, head, heads, width, block, dim)
    value = raw.to(tl.float32)
    if norm >= 0:
        scale = tl.rsqrt(tl.sum(value * value, 1) / width + epsilon)[:, None]
        w = tl.load(weight + dim, mask=dim < width, other=0.0).to(tl.float32)[None, :]
        value = _scaled(value * scale, w, norm, raw.dtype).to(raw.dtype).to(tl.float32)
    if layout != 0:
        half: tl.constexpr = rotated // 2
        if layout == 1:
            partner = tl.where(dim < half, dim + half, dim - half)
            sign = tl.where(dim < half, -1.0, 1.0)
        else:
            partner = dim ^ 1
            sign = tl.where(dim % 2 == 0, -1.0, 1.0)
        partner = tl.where(dim < rotated, partner, dim)
        other = _rows(x, row_stride, row, head, heads, width, block, partner).to(tl.float32)
        if norm >= 0:
            w = tl.load(weight + partner, mask=partner < width, other=0.0).to(tl.float32)[None, :]
            other = _scaled(other * scale, w, norm, raw.dtype).to(raw.dtype).to(tl.float32)
        turns = dim < rotated
        c = tl.load(cos + row * columns + dim % columns, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + row * columns + dim % columns, mask=turns, other=0.0).to(tl.float32)
        value = value * c[None, :] + other * (s * sign)[None, :]
    return value.to(raw.dtype)


@triton.jit
def _store(cache, exponents, value, place, dim, inside, here, width: tl.constexpr, scaled: tl.constexpr):
    """Heads (heads, block) at `place` of the cache."""
    if scaled:
        value = value.to(tl.float32)
        bits = tl.max(tl.abs(value), 1).to(tl.int32, bitcast=True)
        # The largest becomes at least 128 and less than 256, of 448.
        exponent = tl.maximum(((bits >> 23) & 255) - 134, -100)
        tl.store(exponents + place, exponent.to(tl.int8)[:, None], mask=here[:, None])
        value = (value * ((127 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]).to(cache.dtype.element_ty)
    tl.store(cache + place * width + dim[None, :], value, mask=inside)


@triton.jit
def _place_kernel(
    q, k, v, q_stride, k_stride, v_stride, cos, sin, q_weight, k_weight, q_epsilon, k_epsilon,
    slots, q_out, k_out, k_cache, v_cache, k_exponents, v_exponents, heads, kv_heads,
    width: tl.constexpr, v_width: tl.constexpr, rotated: tl.constexpr, columns: tl.constexpr, layout: tl.constexpr,
    q_norm: tl.constexpr, k_norm: tl.constexpr, writes_q: tl.constexpr, keeps_k: tl.constexpr,
    scaled: tl.constexpr, page: tl.constexpr, q_groups: tl.constexpr, block: tl.constexpr, v_block: tl.constexpr,
    many: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    if group < q_groups:
        if writes_q:
            head = group * many + tl.arange(0, many)
            dim = tl.arange(0, block)
            value = _turned(
                q, q_stride, row, head, heads, cos, sin, q_weight, q_epsilon, width, rotated, columns, layout, q_norm,
                block,
            )  # fmt: skip
            inside = (head < heads)[:, None] & (dim < width)[None, :]
            tl.store(q_out + (row * heads + head[:, None]) * width + dim[None, :], value, mask=inside)
    else:
        head = (group - q_groups) * many + tl.arange(0, many)
        dim = tl.arange(0, block)
        slot = tl.load(slots + row).to(tl.int64)
        inside = (head < kv_heads)[:, None] & (dim < width)[None, :]
        value = _turned(
            k, k_stride, row, head, kv_heads, cos, sin, k_weight, k_epsilon, width, rotated, columns, layout, k_norm,
            block,
        )  # fmt: skip
        if keeps_k:
            tl.store(k_out + (row * kv_heads + head[:, None]) * width + dim[None, :], value, mask=inside)
        v_dim = tl.arange(0, v_block)
        v_value = _rows(v, v_stride, row, head, kv_heads, v_width, v_block, v_dim)
        # Rows that only fill a batch up have no slot.
        if slot >= 0:
            place = ((slot // page) * kv_heads + head[:, None]) * page + slot % page
            here = head < kv_heads
            _store(k_cache, k_exponents, value, place, dim, inside, here, width, scaled)
            v_inside = here[:, None] & (v_dim < v_width)[None, :]
            _store(v_cache, v_exponents, v_value, place, v_dim, v_inside, here, v_width, scaled)


def place(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    slots_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tokens: int,
    *,
    turn: tuple[Tensor, Tensor] | None = None,
    layout: int = NONE,
    norms: tuple[HeadNorm, HeadNorm] | None = None,
    keep_k: bool = False,
    exponents: Exponents | None = None,
) -> tuple[Tensor, Tensor]:
    """Store the step's keys and values; return queries and (with `keep_k`) keys as they are attended with.

    q, k, v: any row stride, heads dense. `turn`: cos and sin (T, R or R/2). A slot below 0 is not written.
    """
    tokens, heads, width = q_THD.shape
    kv_heads, v_width = k_TKD.shape[1], v_TKD.shape[2]
    writes_q = layout != NONE or norms is not None
    q_out = torch.empty(tokens, heads, width, dtype=q_THD.dtype, device=q_THD.device) if writes_q else q_THD
    k_out = torch.empty(tokens, kv_heads, width, dtype=k_TKD.dtype, device=k_TKD.device) if keep_k else k_TKD
    if not tokens:
        return q_out, k_out
    cos, sin = turn if turn is not None else (slots_T, slots_T)
    columns = cos.shape[-1] if turn is not None else 1
    rotated = columns if layout != NONE else 0
    q_norm, k_norm = norms if norms is not None else (HeadNorm(slots_T, 0.0, -1), HeadNorm(slots_T, 0.0, -1))
    many = min(_HEADS, triton.next_power_of_2(max(heads, kv_heads)))
    q_groups = triton.cdiv(heads, many) if writes_q else 0
    k_exponents, v_exponents = exponents if exponents is not None else (slots_T, slots_T)
    _place_kernel[(tokens, q_groups + triton.cdiv(kv_heads, many))](
        q_THD, k_TKD, v_TKD, q_THD.stride(0), k_TKD.stride(0), v_TKD.stride(0), cos, sin,
        q_norm.weight_D, k_norm.weight_D, q_norm.epsilon, k_norm.epsilon,
        slots_T, q_out, k_out, k_cache, v_cache, k_exponents, v_exponents, heads, kv_heads,
        width, v_width, rotated, columns, layout, q_norm.kind, k_norm.kind, writes_q, keep_k, exponents is not None,
        block_tokens, q_groups, triton.next_power_of_2(width), triton.next_power_of_2(v_width), many,
        is_early(), num_warps=4, **options(),
    )  # fmt: skip
    return q_out, k_out
