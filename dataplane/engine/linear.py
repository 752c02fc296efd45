"""Fast, batch-invariant matrix products on a CPU: oneDNN with packed weights, of numbers of rows that give each row the
same bits on this machine (row_bits.py).

A packed product is the fastest way: half the time of `F.linear` for one row in bfloat16. A CPU without bfloat16
instructions, and float16 on any, compute in float32 and round each result once, as the half-precision kernels do.

Shape letters: T rows, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataplane.engine.huge_pages import collapse
from dataplane.engine.row_bits import COUNTS, by_counts, is_steady, probe_rows, probe_weight, steady_counts

_CACHED_ELEMENTS = 1 << 24
"""A weight of more stays in no cache, and is packed for what reads it fastest: up to 16 rows."""

ROWS_MIN = 4
"""Rows that a step has at least: what is small is never computed as the special case of one row."""

TRIED_FLOP = 2e9
"""Of the largest product whose bits are looked at: some hundredths of a second."""

Packed = tuple[Tensor, tuple[int, ...]]
"""A packed weight, and numbers of rows that it is multiplied by."""

_product = torch.ops.mkldnn._linear_pointwise.default


class PackedMatmul:
    """Takes the place of `F.linear` on a module (`dataplane.parallel.tensor.Matmul`).

    Keeps a packed copy of each weight that it meets: a module may own several, as slices of one tensor.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[int, tuple[int, ...]], Packed] = {}
        # The weight packed last, and what it became: for most modules the only one.
        self._last: tuple[Tensor | None, Packed] = None, (torch.empty(0), ())

    def __call__(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        packed, counts = self._last[1] if self._last[0] is weight_OI else self._find(weight_OI)
        bias_O = None if bias_O is None else bias_O.to(packed.dtype)
        if x.dtype == packed.dtype and x.numel() // x.shape[-1] in counts:
            return _product(x, packed, bias_O, "none", [], "")
        rows = x.reshape(-1, x.shape[-1]).to(packed.dtype)
        if not len(rows):
            return x.new_empty(*x.shape[:-1], weight_OI.shape[0])
        y = by_counts(lambda part: _product(part, packed, bias_O, "none", [], ""), rows, counts)
        return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    def _find(self, weight_OI: Tensor) -> Packed:
        found = self._packed.get((weight_OI.data_ptr(), weight_OI.shape))
        return self.prepare(weight_OI) if found is None else found

    def prepare(self, weight_OI: Tensor) -> Packed:
        """Pack a weight that will be multiplied by, on huge pages where there are any; and how many rows at a time."""
        weight = weight_OI.detach().to(packed_dtype(weight_OI.dtype)).contiguous()
        packed = _pack(weight)
        collapse(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))
        made = packed, row_counts(packed, *weight.shape)
        self._packed[weight_OI.data_ptr(), weight_OI.shape] = made
        self._last = weight_OI, made
        return made


def _pack(weight_OI: Tensor) -> Tensor:
    """In the order for one row, products of almost all numbers of rows have the same bits. In the one for 16 they have
    others from 33 or 37 rows on (bfloat16, AMX), but are up to a fifth faster, and those of few rows up to twice as
    fast where the weight comes from memory."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, 16 if _is_large(weight_OI.numel()) else 1)


def _is_large(elements: int) -> bool:
    return elements > _CACHED_ELEMENTS


def row_counts(packed: Tensor, outputs: int, inputs: int) -> tuple[int, ...]:
    """Numbers of rows for which packed products of this shape give each row the same bits, with as many threads as are
    set now."""
    key = outputs, inputs, packed.dtype, torch.get_num_threads()
    if key not in _found:
        tried = [n for n in COUNTS if n <= _ALWAYS_TRIED or 2 * n * outputs * inputs <= TRIED_FLOP]
        # A large one has results enough to show another order without a weight that is made for it.
        weight = packed if _is_large(outputs * inputs) else _pack(probe_weight(outputs, inputs, packed.dtype))
        rows = probe_rows(tried[-1], inputs, packed.dtype)
        _found[key] = steady_counts(lambda part: _product(part, weight, None, "none", [], ""), rows, tried)
    return _found[key]


_found: dict[tuple[int, int, torch.dtype, int], tuple[int, ...]] = {}
_ALWAYS_TRIED = 32


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
    for item in module.modules():
        if _is_router(item):
            _compute_by_blocks(item)


@cache
def _block_rows(outputs: int, inputs: int, dtype: torch.dtype, threads: int) -> int:
    """Rows of a block in which it does not matter where a row stands, also where a router computes in float32. With so
    many `threads` as are set now."""

    def steady(count: int, dtype: torch.dtype) -> bool:
        weight = probe_weight(outputs, inputs, dtype)
        return is_steady(lambda part: F.linear(part, weight), probe_rows(count, inputs, dtype))

    return next((n for n in (16, 32, 8, 4) if steady(n, dtype) and steady(n, torch.float32)), 1)


def _is_router(module: Any) -> bool:
    """Whether it multiplies by a matrix of its own in code of its own."""
    weight = module._parameters.get("weight")
    own = not isinstance(module, nn.Embedding | nn.Linear) and not hasattr(module, "matmul")
    return own and weight is not None and weight.dim() == 2


def _compute_by_blocks(router: Any) -> None:
    """Let a router compute blocks of one number of rows: a choice of experts must not turn on its neighbours."""
    forward = router.forward
    outputs, inputs = router.weight.shape
    block = _block_rows(outputs, inputs, router.weight.dtype, torch.get_num_threads())

    def by_blocks(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = hidden_states.reshape(-1, inputs)
        parts = [forward(F.pad(part, (0, 0, 0, block - len(part))), *args, **kwargs) for part in rows.split(block)]
        if torch.is_tensor(parts[0]):
            return torch.cat(parts)[: len(rows)]
        return tuple(torch.cat(items)[: len(rows)] for items in zip(*parts, strict=True))

    router.forward = by_blocks
