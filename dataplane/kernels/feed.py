"""A step's tokens, those that the step before sampled taken from where it left them."""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


@triton.jit
def _feed_kernel(tokens, fed, drawn, out, count, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    inside = index < count
    source = tl.load(fed + index, mask=inside, other=-1)
    known = tl.load(tokens + index, mask=inside, other=0)
    given = tl.load(drawn + source, mask=inside & (source >= 0), other=0).to(tl.int32)
    # A poisoned row drew -1; what is computed from it is thrown away.
    tl.store(out + index, tl.where(source >= 0, tl.maximum(given, 0), known), mask=inside)


def feed(tokens_T: Tensor, fed_T: Tensor, drawn_N: Tensor) -> Tensor:
    """(T,) int32: `drawn_N[fed]` where `fed` is not below 0, else the token."""
    out = torch.empty_like(tokens_T)
    count = len(tokens_T)
    if count:
        _feed_kernel[(triton.cdiv(count, _BLOCK),)](tokens_T, fed_T, drawn_N, out, count, _BLOCK, num_warps=4)
    return out
