"""RMS norm, alone or after adding to the residual stream.

Shape letters: T tokens, H features.
"""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dataplane.kernels.early import is_early, options

AFTER_CAST, BEFORE_CAST, ONE_PLUS = 0, 1, 2
"""How the weight is applied: `w · cast(x)`, `cast(w · x)`, `cast((1 + w) · x)`."""


@triton.jit
def _scaled(normed, weight, kind: tl.constexpr, dtype: tl.constexpr):
    if kind == 0:
        return normed.to(dtype).to(tl.float32) * weight
    if kind == 1:
        return normed * weight
    return normed * (1.0 + weight)


@triton.jit
def _norm_kernel(
    x, delta, weight, stream, out, width, epsilon, kind: tl.constexpr, adds: tl.constexpr, block: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0)
    dtype = value.dtype
    if adds:
        more = tl.load(delta + row * width + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(dtype)
        tl.store(stream + row * width + column, value, mask=inside)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, _scaled(value * scale, w, kind, dtype).to(dtype), mask=inside)


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float, kind: int) -> Tensor:
    """The norm of each row, in the type of `x_TH`."""
    x_TH = x_TH.contiguous()
    out = torch.empty_like(x_TH)
    _launch(x_TH, x_TH, weight_H, out, out, epsilon, kind, adds=False)
    return out


def add_rms_norm(x_TH: Tensor, delta_TH: Tensor, weight_H: Tensor, epsilon: float, kind: int) -> tuple[Tensor, Tensor]:
    """(x + delta, the norm of that)."""
    x_TH, delta_TH = x_TH.contiguous(), delta_TH.contiguous()
    stream, out = torch.empty_like(x_TH), torch.empty_like(x_TH)
    _launch(x_TH, delta_TH, weight_H, stream, out, epsilon, kind, adds=True)
    return stream, out


def _launch(
    x: Tensor, delta: Tensor, weight: Tensor, stream: Tensor, out: Tensor, epsilon: float, kind: int, *, adds: bool
) -> None:
    width = x.shape[-1]
    rows = x.numel() // width
    block = triton.next_power_of_2(width)
    warps = min(max(block // 512, 1), 16)
    if rows:
        _norm_kernel[(rows,)](
            x, delta, weight, stream, out, width, epsilon, kind, adds, block, is_early(), num_warps=warps, **options()
        )  # fmt: skip
