"""Matrix products whose every row has the same bits whatever other rows there are.

Each element is one sum over the inputs, in rising order, by the same tensor core instruction's arithmetic: tiles differ
in how much they hold, never in how an element is added up. Rows may be grouped, each group with a weight of its own
(experts); the groups' sizes stay on the device, so the launch can be captured.

Shape letters: T rows, I inputs, O outputs, E groups.
"""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_NEIGHBOURS = 8
"""Tiles of outputs that run side by side, for the second-level cache."""


@triton.jit
def _product_kernel(
    x, weight, bias, ends, out, rows, outputs, inputs, w_group, w_output, w_input, groups, row_tiles,
    grouped: tl.constexpr, biased: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
    block_g: tl.constexpr, block_o: tl.constexpr, block_r: tl.constexpr, block_k: tl.constexpr,
    neighbours: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    band = program // (neighbours * row_tiles)
    high = tl.minimum(tl.cdiv(outputs, block_o) - band * neighbours, neighbours)
    within = program % (neighbours * row_tiles)
    o_tile = band * neighbours + within % high
    r_tile = within // high
    group = 0
    first = r_tile * block_r
    last = rows
    if grouped:
        g = tl.arange(0, block_g)
        end_G = tl.load(ends + g, mask=g < groups, other=0)
        begin_G = tl.load(ends + g - 1, mask=(g > 0) & (g < groups), other=0)
        tiles_G = tl.where(g < groups, (end_G - begin_G + block_r - 1) // block_r, 0)
        below_G = tl.cumsum(tiles_G, 0)
        group = tl.sum((below_G <= r_tile).to(tl.int32), 0)
        mine = g == group
        before = tl.sum(tl.where(mine, below_G - tiles_G, 0), 0)
        first = tl.sum(tl.where(mine, begin_G, 0), 0) + (r_tile - before) * block_r
        last = tl.sum(tl.where(mine, end_G, 0), 0)
    if first < last:
        o = o_tile * block_o + tl.arange(0, block_o)
        r = first + tl.arange(0, block_r)
        k = tl.arange(0, block_k)
        w_OK = weight + o.to(tl.int64)[:, None] * w_output + k[None, :] * w_input
        if grouped:
            w_OK += tl.cast(group, tl.int64) * w_group
        x_KR = x + r.to(tl.int64)[None, :] * inputs + k[:, None]
        here_O, here_R = o < outputs, r < last
        acc = tl.zeros([block_o, block_r], tl.float32)
        for start in tl.range(0, inputs, block_k, num_stages=stages):
            if even:
                a = tl.load(w_OK)
                b = tl.load(x_KR, mask=here_R[None, :], other=0.0)
            else:
                inside = start + k < inputs
                a = tl.load(w_OK, mask=here_O[:, None] & inside[None, :], other=0.0)
                b = tl.load(x_KR, mask=here_R[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=precision)
            w_OK += block_k * w_input
            x_KR += block_k
        if biased:
            base = bias + group * outputs if grouped else bias
            acc += tl.load(base + o, mask=here_O, other=0.0).to(tl.float32)[:, None]
        tl.store(
            out + r.to(tl.int64)[None, :] * outputs + o[:, None],
            acc.to(out.dtype.element_ty),
            mask=here_O[:, None] & here_R[None, :],
        )


@dataclass(frozen=True, slots=True)
class Tile:
    """Outputs, rows and inputs of a tile; warps, and stages of the software pipeline."""

    outputs: int
    rows: int
    inputs: int
    warps: int
    stages: int


SMALL = Tile(32, 32, 16, 4, 1)
"""For single precision."""


def tile_for(rows: int, outputs: int) -> Tile:
    """For so many rows a group: the fastest or nearly so, on an H100, of those that give the GPU enough tiles."""
    for most, tile in _FEW:
        if rows <= most:
            return tile
    for tile, tiles in _MANY:
        if triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs) >= tiles:
            return tile
    return _FEW[-1][1]


_FEW = ((16, Tile(64, 16, 128, 4, 5)), (32, Tile(64, 32, 128, 4, 4)), (64, Tile(64, 64, 128, 4, 4)))
"""For up to so many rows."""

_MANY = ((Tile(128, 256, 64, 8, 3), 200), (Tile(128, 128, 64, 8, 4), 96), (Tile(64, 128, 64, 4, 4), 100))
"""Where there are at least so many tiles of them."""


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """(…, O): x · weightᵀ (+ bias), summed in float32 and rounded once."""
    outputs, inputs = weight_OI.shape
    x = x_TI.reshape(-1, inputs).contiguous()
    out = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
    product_into(x, weight_OI, out, bias_O, tile)
    return out.view(*x_TI.shape[:-1], outputs)


def product_into(
    x_TI: Tensor, weight_OI: Tensor, y_TO: Tensor, bias_O: Tensor | None = None, tile: Tile | None = None
) -> None:
    """`product` into `y_TO`. Both contiguous."""
    if len(x_TI):
        strides = 0, weight_OI.stride(0), weight_OI.stride(1)
        _launch(x_TI, weight_OI, bias_O, None, y_TO, strides, tile or tile_for(len(x_TI), len(weight_OI)))


def grouped_product(
    x_TI: Tensor, weight_EIO: Tensor, ends_E: Tensor, bias_EO: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """(T, O): rows up to ends_E[0] by the first weight, then up to ends_E[1] by the second, and so on. Rows behind the
    last end are left as they are in memory. Weights may have any strides."""
    groups, _, outputs = weight_EIO.shape
    x = x_TI.contiguous()
    out = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
    if len(x):
        strides = weight_EIO.stride(0), weight_EIO.stride(2), weight_EIO.stride(1)
        _launch(x, weight_EIO, bias_EO, ends_E, out, strides, tile or tile_for(-(-len(x) // groups), outputs))
    return out


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ends_E: Tensor | None,
    out: Tensor,
    strides: tuple[int, int, int],
    tile: Tile,
) -> None:
    rows, inputs = x.shape
    outputs = out.shape[1]
    single = x.dtype == torch.float32
    tile = SMALL if single else tile
    groups = len(ends_E) if ends_E is not None else 0
    row_tiles = triton.cdiv(rows, tile.rows) + (min(groups, rows) if groups else 0)
    _product_kernel[(triton.cdiv(outputs, tile.outputs) * row_tiles,)](
        x, weight, x if bias is None else bias, x if ends_E is None else ends_E, out, rows, outputs, inputs, *strides,
        groups, row_tiles, ends_E is not None, bias is not None,
        outputs % tile.outputs == 0 and inputs % tile.inputs == 0, "ieee" if single else "tf32",
        triton.next_power_of_2(max(groups, 1)), tile.outputs, tile.rows, tile.inputs, _NEIGHBOURS, tile.stages,
        num_warps=tile.warps,
    )  # fmt: skip
