"""Which numbers of rows a product on a CPU may be asked for, so that each row has the same bits in any batch.

A library chooses the kernel of a product, and with it the order of its sums, by how many rows there are: by rules that
depend on the processor, its caches and the number of threads, and are written nowhere. On one Xeon bfloat16 products of
oneDNN have the same bits for 1 to 300 rows; on the next, 1024 inputs and 640 outputs have others from 37 rows on, and
MKL's of 256 in single precision from 11. So they are found by trying, on the machine at hand, and other numbers are cut
into them.

Shape letters: R rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""(R, I) -> (R, O), or whatever else has a row for each row."""

COUNTS = (*range(4, 32, 4), *range(32, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 1025, 128))
"""Numbers of rows to try. The least is 4: of that many oneDNN takes less time than of two."""

PADDED_ROWS = 3
PADDED_SHARE = 8
"""So many rows that nobody wants, or one for so many that somebody does, are computed rather than another product
made: that would read the weight again."""

_SHIFTS = (1, 2, 3, 5)
_SEED = 20_261_128


def probe_weight(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """(O, I) against which products of `probe_rows` nearly cancel out: other orders of adding then show, though results
    are rounded to half precision."""
    draw = torch.Generator().manual_seed(_SEED)
    some = torch.randn(min(outputs, 64), inputs // 2, generator=draw)
    other = -some * (1 + torch.randn(some.shape, generator=draw) / 64)
    rest = torch.randn(len(some), inputs % 2, generator=draw)
    weight = torch.cat((some, other, rest), 1).to(dtype)
    return weight.repeat(-(-outputs // len(weight)), 1)[:outputs]


def probe_rows(count: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """(R, I); see `probe_weight`."""
    draw = torch.Generator().manual_seed(_SEED + 1)
    half = torch.randn(count, inputs // 2, generator=draw)
    return torch.cat((half, half, torch.randn(count, inputs % 2, generator=draw)), 1).to(dtype)


def steady_counts(product: Product, rows_RI: Tensor, counts: Sequence[int] = COUNTS) -> tuple[int, ...]:
    """Those of `counts`, rising, of which `product` gives each of these rows, wherever it stands, the bits that it has
    in the least of them. (1,) if the place matters in all: one row alone has but one."""
    counts = [count for count in counts if count <= len(rows_RI)]
    least = next((count for count in counts if is_steady(product, rows_RI[:count])), None)
    if least is None:
        return (1,)
    found, known = (least,), product(rows_RI[:least])
    for count in counts[counts.index(least) + 1 :]:
        known = torch.cat((known, by_counts(product, rows_RI[len(known) : count], found)))
        if torch.equal(product(rows_RI[:count]), known):
            found = (*found, count)
    return found


def is_steady(product: Product, rows_RI: Tensor) -> bool:
    """Whether a product of so many rows gives one the same bits wherever it stands."""
    result = product(rows_RI)
    return all(torch.equal(product(rows_RI.roll(shift, 0)), result.roll(shift, 0)) for shift in _SHIFTS)


def by_counts(product: Product, rows_RI: Tensor, counts: tuple[int, ...]) -> Tensor:
    """`product` of the rows, asked for no other numbers of them than `counts`."""
    count = len(rows_RI)
    sizes = cut(count, counts)
    if sizes == (count,):
        return product(rows_RI)
    results: list[Tensor] = []
    start = 0
    for size in sizes:
        part = rows_RI[start : start + size]
        results.append(product(F.pad(part, (0, 0, 0, size - len(part))) if len(part) < size else part))
        start += size
    return (results[0] if len(results) == 1 else torch.cat(results))[:count]


@lru_cache(maxsize=4096)
def cut(count: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """`count` rows in parts of these sizes, rising ones, the largest first; the last may have rows that are filled
    up."""
    sizes: list[int] = []
    while count > 0:
        above = next((size for size in counts if size >= count), None)
        below = max((size for size in counts if size <= count), default=counts[0])
        may_pad = max(PADDED_ROWS, count // PADDED_SHARE)
        sizes.append(above if above is not None and above - count <= may_pad else below)
        count -= sizes[-1]
    return tuple(sizes)
