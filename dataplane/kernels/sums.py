"""Sums of rows, each by one program: in the same order whatever other rows there are.

Shape letters: T rows, H columns.
"""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_kernel(x, out, width, divisor, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + row, (tl.sum(value, 0) / divisor).to(out.dtype.element_ty))


def row_sums(x: Tensor, divisor: float = 1.0) -> Tensor:
    """(…, H) → (…): sums over the last dimension in float32, divided, in the type of `x`."""
    x = x.contiguous()
    width = x.shape[-1]
    out = torch.empty(x.shape[:-1], dtype=x.dtype, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(width)
        _sum_kernel[(out.numel(),)](x, out, width, divisor, block, num_warps=min(max(block // 512, 1), 16))
    return out
