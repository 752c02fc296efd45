"""The largest logit of each row, in two passes.

Shape letters: N rows, V vocabulary, C parts of a row.
"""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _part_kernel(logits, stride, width, best, where, parts, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = part * block + tl.arange(0, block)
    value = tl.load(logits + row * stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
    # A NaN wins, as infinity: the row is told apart by it.
    value = tl.where(value != value, float("inf"), value)
    top, index = tl.max(value, 0, return_indices=True)
    tl.store(best + row * parts + part, top)
    tl.store(where + row * parts + part, part * block + index)


@triton.jit
def _whole_kernel(best, where, out, parts, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, block)
    value = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    top, index = tl.max(value, 0, return_indices=True)
    token = tl.load(where + row * parts + index)
    finite = (top < float("inf")) & (top > float("-inf"))
    tl.store(out + row, tl.where(finite, token, -1).to(tl.int64))


def greedy(logits_NV: Tensor, out_N: Tensor) -> Tensor:
    """Index of each row's largest value, the lowest of equal ones, -1 where it is no finite number: into the first
    rows of `out_N` (int64). Returns those."""
    rows, width = logits_NV.shape
    parts = triton.cdiv(width, _BLOCK)
    best = torch.empty(rows, parts, dtype=torch.float32, device=logits_NV.device)
    where = torch.empty(rows, parts, dtype=torch.int32, device=logits_NV.device)
    out = out_N[:rows]
    if rows:
        _part_kernel[(rows, parts)](logits_NV, logits_NV.stride(0), width, best, where, parts, _BLOCK, num_warps=4)
        _whole_kernel[(rows,)](best, where, out, parts, triton.next_power_of_2(parts), num_warps=1)
    return out
