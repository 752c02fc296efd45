"""Fast, batch-invariant matrix products on a CPU: oneDNN with packed weights.

A packed product of two or more rows gives each row the same bits whatever the others are (measured: float32 and
bfloat16, 2 to 192 rows); of one row it may not, so a lone row is computed twice. It also is the fastest way: half the
time of `F.linear` for one row in bfloat16. A CPU without bfloat16 instructions, and float16 on any, compute in float32
and round each result once, as the half-precision kernels do.

Shape letters: T rows, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS_HINT = 16
"""Number of rows that the packing is chosen for; one packing serves every number."""


class PackedMatmul:
    """Takes the place of `F.linear` on a module (`dataplane.parallel.tensor.Matmul`).

    Keeps a packed copy of each weight that it meets: a module may own several, as slices of one tensor.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def __call__(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        packed = self._packed.get((weight_OI.data_ptr(), weight_OI.shape))
        if packed is None:
            packed = self.prepare(weight_OI)
        rows = x.reshape(-1, x.shape[-1]).to(packed.dtype)
        bias_O = None if bias_O is None else bias_O.to(packed.dtype)
        lone = rows.shape[0] == 1
        if lone:
            rows = rows.expand(2, -1).contiguous()
        y = torch.ops.mkldnn._linear_pointwise(rows, packed, bias_O, "none", [], "")
        return (y[:1] if lone else y).view(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    def prepare(self, weight_OI: Tensor) -> Tensor:
        """Pack a weight that will be multiplied by."""
        weight = weight_OI.detach().to(packed_dtype(weight_OI.dtype)).contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        self._packed[weight_OI.data_ptr(), weight_OI.shape] = packed
        return packed


def packed_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of this type are computed in on this machine."""
    native = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def pack(module: nn.Module, report: Callable[[float], None] = lambda _: None) -> None:
    """Give every module under `module` with a `matmul` a packed one, and pack its weight now if it is one matrix.

    An nn.Linear that no one has fitted stays as it is. `report` gets the share that is done.
    """
    items = [item for item in module.modules() if getattr(item, "matmul", None) is F.linear]
    for index, item in enumerate(items):
        report(index / len(items))
        packed = PackedMatmul()
        weight = getattr(item, "weight", None)
        if isinstance(weight, Tensor):
            packed.prepare(weight)
        item.matmul = packed  # type: ignore[assignment]
