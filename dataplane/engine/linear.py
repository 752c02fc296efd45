"""Fast, batch-invariant matrix products on a CPU: oneDNN with packed weights.

A packed product of two or more rows gives each row the same bits whatever the others are (measured: float32 and
bfloat16, 2 to 192 rows); of one row it may not. It also is the fastest way: half the time of `F.linear` for one row in
bfloat16; and of four rows takes less time than one of two (an eighth less, bfloat16), so fewer are filled up to four.
A CPU without bfloat16 instructions, and float16 on any, compute in float32 and round each result once, as the
half-precision kernels do.

Shape letters: T rows, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataplane.engine.huge_pages import collapse

_ROWS_HINT = 16
"""Number of rows that the packing is chosen for; one packing serves every number."""

ROWS_MIN = 4
"""Rows that a product has at least. Routers' plain products, too, have other bits below that."""

_product = torch.ops.mkldnn._linear_pointwise.default


class PackedMatmul:
    """Takes the place of `F.linear` on a module (`dataplane.parallel.tensor.Matmul`).

    Keeps a packed copy of each weight that it meets: a module may own several, as slices of one tensor.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        # The weight packed last, and what it became: for most modules the only one.
        self._last: tuple[Tensor | None, Tensor] = None, torch.empty(0)

    def __call__(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        packed = self._last[1] if self._last[0] is weight_OI else self._find(weight_OI)
        bias_O = None if bias_O is None else bias_O.to(packed.dtype)
        if x.dtype == packed.dtype and x.numel() >= ROWS_MIN * x.shape[-1]:
            return _product(x, packed, bias_O, "none", [], "")
        rows = x.reshape(-1, x.shape[-1]).to(packed.dtype)
        count = rows.shape[0]
        if count < ROWS_MIN:
            rows = F.pad(rows, (0, 0, 0, ROWS_MIN - count))
        y = _product(rows, packed, bias_O, "none", [], "")[:count]
        return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    def _find(self, weight_OI: Tensor) -> Tensor:
        packed = self._packed.get((weight_OI.data_ptr(), weight_OI.shape))
        return self.prepare(weight_OI) if packed is None else packed

    def prepare(self, weight_OI: Tensor) -> Tensor:
        """Pack a weight that will be multiplied by, on huge pages where there are any."""
        weight = weight_OI.detach().to(packed_dtype(weight_OI.dtype)).contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        collapse(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))
        self._packed[weight_OI.data_ptr(), weight_OI.shape] = packed
        self._last = weight_OI, packed
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
