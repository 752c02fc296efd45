"""Tensor-parallel modules: a layer's product cut over the ranks of the tensor group (Megatron-LM, arXiv:1909.08053).

Shape letters: T tokens of the step, H hidden size, O output features, V vocabulary, D head size; `_local` marks the
part of this rank.

Convention for kernels: every weight product of a fitted model goes through its module's attribute `matmul`, a callable
`(x_TI, weight_OI, bias_O | None) -> y_TO`, `F.linear` unless something faster took its place
(`dataplane.engine.linear.pack` on CPU). The weight stays on the module, whatever `matmul` keeps for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataplane.parallel.groups import Group
from dataplane.parallel.split import Range, cut

Matmul = Callable[[Tensor, Tensor, Tensor | None], Tensor]
MatmulInto = Callable[[Tensor, Tensor, Tensor], object]
"""(x_TI, weight_OI, y_TO): fills y, contiguous, with the product."""

PIECES_MAX = 4
PIECE_BYTES = 8 * 1024 * 1024
"""Least of a result that is summed beside the product of the next piece."""
_TILE_ROWS = 128
"""A piece is a whole number of a product's tiles."""


class Linear(nn.Module):
    """A linear layer whose product can be replaced. Also the column-parallel one: its rows are this rank's outputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.matmul: Matmul = F.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"


class RowParallelLinear(Linear):
    """Each rank multiplies its share of the inputs; the partial results are summed over `group`.

    The bias is added once, after the sum: every rank holds the whole of it. Where `matmul_into` is set, a large result
    is made in pieces of rows, and each piece is summed while the next is multiplied.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, group: Group) -> None:
        super().__init__(weight, bias)
        self.group = group
        self.matmul_into: MatmulInto | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.group.size == 1:
            return self.matmul(x, self.weight, self.bias)
        into = self.matmul_into
        y = self._summed(x) if into is None else self._summed_by_pieces(x, into)
        return y if self.bias is None else y + self.bias

    def _summed(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.matmul(x, self.weight, None))

    def _summed_by_pieces(self, x: Tensor, matmul_into: MatmulInto) -> Tensor:
        pieces = row_pieces(x.numel() // x.shape[-1], len(self.weight) * x.element_size())
        if len(pieces) == 1:
            return self._summed(x)
        y = x.new_empty(*x.shape[:-1], len(self.weight))
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, len(self.weight))
        under_way = []
        for start, stop in pieces:
            matmul_into(x_TI[start:stop], self.weight, y_TO[start:stop])
            under_way.append(self.group.begin_sum(y_TO[start:stop]))
        for exchange in under_way:
            exchange.wait()
        return y


def row_pieces(rows: int, row_bytes: int) -> list[Range]:
    """The pieces in which a result of so many rows is made and summed; of a small one, one."""
    tiles = -(-rows // _TILE_ROWS)
    count = max(1, min(PIECES_MAX, rows * row_bytes // PIECE_BYTES, tiles))
    parts = [cut(tiles, count, index) for index in range(count)]
    return [(start * _TILE_ROWS, min(stop * _TILE_ROWS, rows)) for start, stop in parts]


class FusedLinear(Linear):
    """Several products of the same input as one. `FusedPart`s hand out the results to the code that asks for them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        super().__init__(weight, bias)
        assert sum(sizes) == weight.shape[0]
        self._sizes = list(sizes)
        self._input: Tensor | None = None
        self._parts: list[Tensor | None] = []

    @property
    def sizes(self) -> tuple[int, ...]:
        """Output features of each product."""
        return tuple(self._sizes)

    def part(self, x: Tensor, index: int) -> Tensor:
        """Output `index` for `x`. The product is computed at the first request for `x`, and kept till all went."""
        if self._input is not x:
            self._input = x
            self._parts = list(super().forward(x).split(self._sizes, dim=-1))
        result = self._parts[index]
        assert result is not None, "one part was asked for twice: this layer cannot be fused"
        self._parts[index] = None
        if all(item is None for item in self._parts):
            self._input = None
        return result


class FusedPart(nn.Module):
    """Stands where one of the fused layers stood."""

    def __init__(self, fused: FusedLinear, index: int, owner: bool) -> None:
        super().__init__()
        # One part owns the fused layer in the module tree; the others must not list its parameters again.
        if owner:
            self.fused = fused
        self._fused = (fused,)
        self._index = index

    @property
    def whole(self) -> FusedLinear:
        return self._fused[0]

    def forward(self, x: Tensor) -> Tensor:
        return self._fused[0].part(x, self._index)


def fuse(fused: FusedLinear, count: int) -> tuple[FusedPart, ...]:
    """The modules that hand out the parts of `fused`."""
    return tuple(FusedPart(fused, index, owner=index == 0) for index in range(count))


class VocabParallelEmbedding(nn.Module):
    """Rows [start, start + count) of an embedding; rows of other ranks count zero and the ranks' results are summed.

    `table` is the model's own module with this rank's rows as its weight: it may scale.
    """

    def __init__(self, table: nn.Embedding, start: int, group: Group) -> None:
        super().__init__()
        # A padding index outside the shard would be refused; it has no meaning at inference.
        table.padding_idx = None
        self.table = table
        self.start = start
        self.group = group

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, ids_T: Tensor) -> Tensor:
        local_T = ids_T - self.start
        outside_T = (local_T < 0) | (local_T >= self.table.weight.shape[0])
        rows_TH = self.table(local_T.masked_fill(outside_T, 0))
        return self.group.all_reduce(rows_TH.masked_fill(outside_T.unsqueeze(-1), 0))


class FullWidthNorm(nn.Module):
    """An RMS norm over all heads' features when each rank holds some of the heads.

    Mean of squares over the full width: `all_reduce(Σ x² / copies) / full_width`, where `copies` ranks hold the same
    heads. `arithmetic` is the formula of the class it replaces, so that half precision rounds as there.
    """

    def __init__(
        self, weight: Tensor, epsilon: float, width: int, copies: int, group: Group, arithmetic: NormArithmetic
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.epsilon = epsilon
        self.width = width
        self.copies = copies
        self.group = group
        self.arithmetic = arithmetic

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        squares = self.group.all_reduce(x32.pow(2).sum(-1, keepdim=True) / self.copies)
        return self.arithmetic(x32 * torch.rsqrt(squares / self.width + self.epsilon), self.weight, x.dtype)


def regroup(model: nn.Module, group: Group) -> None:
    """Let every module of a fitted model exchange over `group`, of the same ranks in a new epoch."""
    for module in model.modules():
        if isinstance(module, RowParallelLinear | VocabParallelEmbedding | FullWidthNorm):
            module.group = group


NormArithmetic = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""(normalised float32 x, weight, result type) -> scaled x."""


def scale_after_cast(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As in Llama's norm."""
    return weight * x.to(dtype)


def scale_before_cast(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As in OLMo 2's norm."""
    return (weight * x).to(dtype)


def scale_by_one_plus(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As in Gemma's norm."""
    return (x * (1.0 + weight.float())).to(dtype)
