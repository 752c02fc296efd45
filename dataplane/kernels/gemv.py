"""A matrix times one vector, at the speed of reading the matrix.

Shape letters: O outputs, I inputs.
"""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 2
COLUMNS_MAX = 2048
"""Rows of a program, and columns that it reads at a time: the fastest of those tried on an H100, for all sizes."""


@triton.jit
def _gemv_kernel(x, weight, bias, out, outputs, inputs, biased: tl.constexpr, rows: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    inside = row < outputs
    base = weight + row.to(tl.int64)[:, None] * inputs
    acc = tl.zeros([rows, block], tl.float32)
    for start in range(0, inputs, block):
        column = start + tl.arange(0, block)
        x_I = tl.load(x + column, mask=column < inputs, other=0.0).to(tl.float32)
        w_RI = tl.load(base + column[None, :], mask=inside[:, None] & (column < inputs)[None, :], other=0.0)
        acc += w_RI.to(tl.float32) * x_I[None, :]
    total = tl.sum(acc, 1)
    if biased:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=inside)


def gemv(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """(O,): weight · x (+ bias), summed in float32."""
    outputs, inputs = weight_OI.shape
    out = torch.empty(outputs, dtype=x_I.dtype, device=x_I.device)
    block = min(max(triton.next_power_of_2(inputs), 256), COLUMNS_MAX)
    _gemv_kernel[(triton.cdiv(outputs, ROWS),)](
        x_I, weight_OI, x_I if bias_O is None else bias_O, out, outputs, inputs, bias_O is not None, ROWS, block,
        num_warps=block // 256,
    )  # fmt: skip
    return out
