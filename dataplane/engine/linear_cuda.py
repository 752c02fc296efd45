"""Products on a GPU: of few rows by kernels of our own, of more by the library; or all batch-invariant."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataplane.kernels.gemv import gemv
from dataplane.kernels.product import grouped_product, product, product_into
from dataplane.parallel import expert
from dataplane.parallel.tensor import RowParallelLinear

ROWS_OURS = 16
"""Products of up to so many rows only read the weight, which our kernel does 3 to 8 % faster than cuBLAS on an H100."""

ROWS_OURS_A_GROUP = 64
"""And grouped ones of up to so many rows a group: torch's are a tenth to a third slower there, and as much faster
above."""


def matmul(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """In the place of `F.linear` (`dataplane.parallel.tensor.Matmul`)."""
    rows = x.numel() // x.shape[-1]
    if rows > ROWS_OURS or not rows or not x.dtype == weight_OI.dtype == torch.bfloat16:
        return F.linear(x, weight_OI, bias_O)
    if rows == 1 and weight_OI.is_contiguous():
        return gemv(x.reshape(-1), weight_OI, bias_O).view(*x.shape[:-1], -1)
    return product(x, weight_OI, bias_O)


def matmul_into(x_TI: Tensor, weight_OI: Tensor, y_TO: Tensor) -> None:
    """Products of many rows (`dataplane.parallel.tensor.MatmulInto`)."""
    torch.mm(x_TI, weight_OI.t(), out=y_TO)


def grouped_matmul(x_SI: Tensor, weight_EIO: Tensor, ends_E: Tensor, bias_EO: Tensor | None) -> Tensor:
    """In the place of `dataplane.parallel.expert.grouped_matmul`, whose float32 asks the host for the sizes."""
    if x_SI.dtype == torch.float32 or len(x_SI) <= ROWS_OURS_A_GROUP * len(ends_E):
        return grouped_product(x_SI, weight_EIO, ends_E, bias_EO)
    return expert.grouped_matmul(x_SI, weight_EIO, ends_E, bias_EO)


def take_over(module: nn.Module, *, exact: bool) -> None:
    """Give every module under `module` with a `matmul` ours. An nn.Linear that no one has fitted stays as it is."""
    for item in module.modules():
        part: Any = item
        if hasattr(item, "matmul"):
            part.matmul = product if exact else matmul
        if hasattr(item, "grouped_matmul"):
            part.grouped_matmul = grouped_product if exact else grouped_matmul


def sum_by_pieces(module: nn.Module, wanted: bool, *, exact: bool) -> None:
    """Let the row-parallel layers under `module` sum a large result by pieces, each beside the next one's product."""
    for item in module.modules():
        if isinstance(item, RowParallelLinear):
            item.matmul_into = (product_into if exact else matmul_into) if wanted else None
