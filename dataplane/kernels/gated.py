"""The product of an activated gate and its partner, both halves of one row.

Shape letters: T tokens, I features of a half.
"""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dataplane.kernels.early import is_early, options

SILU, GELU_TANH, GELU = 0, 1, 2

_BLOCK = 1024


@triton.jit
def _gated_kernel(x, out, width, activation: tl.constexpr, block: tl.constexpr, early: tl.constexpr):
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(x + row * 2 * width + column, mask=inside, other=0.0)
    up = tl.load(x + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    if activation == 0:
        g = g * tl.sigmoid(g)
    elif activation == 1:
        # tanh(y) = 2 sigmoid(2 y) - 1
        g = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        g = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    value = g.to(gate.dtype).to(tl.float32) * up
    tl.store(out + row * width + column, value.to(gate.dtype), mask=inside)


def gated(x: Tensor, activation: int) -> Tensor:
    """(…, 2I) → (…, I): activation(first half) · second half."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    rows = out.numel() // width
    if rows:
        grid = (rows, triton.cdiv(width, _BLOCK))
        _gated_kernel[grid](x, out, width, activation, _BLOCK, is_early(), num_warps=4, **options())
    return out
