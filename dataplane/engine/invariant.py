"""Batch-invariant forms of those operations whose CUDA kernels choose the order of their sums by the number of rows.

A model's fitted parts compute by kernels of our own already; this catches what remains in the forward code of its
class: routers' products, means of norms that no fast module stands for, sums over a token's experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dataplane.kernels.product import product
from dataplane.kernels.sums import row_sums


class InvariantOps(TorchDispatchMode):
    """Takes their place while it is entered."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours: Callable[..., Any] = _OURS.get(func) or func
        return ours(*args, **(kwargs or {}))


def _linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return product(x, weight_OI, bias_O)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b.t())


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    assert beta == alpha == 1, "a scaled product has no batch-invariant form here"
    return product(a, b.t(), bias)


def _sum(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return _reduced(x, dims, keepdim, dtype, 1.0)


def _mean(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    last = range(x.dim()) if dims is None else dims
    return _reduced(x, dims, keepdim, dtype, float(math.prod(x.shape[dim] for dim in last)))


def _reduced(x: Tensor, dims: Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None, divisor: float) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    if not x.is_floating_point():
        return torch.ops.aten.sum.dim_IntList(x, dims, keepdim)
    assert dims is not None, "a sum over everything has no batch-invariant form here"
    assert len(dims) == 1, "a sum over several dimensions has no batch-invariant form here"
    dim = dims[0] % x.dim()
    if dim == x.dim() - 1:
        total = row_sums(x, divisor)
    else:
        first, *others = x.unbind(dim)
        total = first.float()
        for part in others:
            total = total + part
        total = (total / divisor).to(x.dtype)
    return total.unsqueeze(dim) if keepdim else total


_aten = torch.ops.aten
_OURS: dict[Any, Callable[..., Tensor]] = {
    _aten.linear.default: _linear,
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.sum.dim_IntList: _sum,
    _aten.mean.dim: _mean,
}
