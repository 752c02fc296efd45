"""Where a local tensor's values come from: pieces of the model's whole, unsharded tensors.

Surgery writes down pieces as it cuts; loading reads them. The names are those of the transformers model's own state
dict, before any surgery; `checkpoint.py` leads from them to the tensors on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from dataplane.parallel.split import Range

Shape = tuple[int, ...]

Box = tuple[Range, ...]
"""A part of a tensor: one range a dimension."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`local[to] = whole[at]`: a box of the tensor `source`, both ranges of the same lengths."""

    source: str
    at: Box
    to: Box

    def __post_init__(self) -> None:
        assert [b - a for a, b in self.at] == [b - a for a, b in self.to], self

    @property
    def values(self) -> int:
        return size(self.at)

    def within(self, box: Box) -> Piece:
        """The part of it that lies in `box`, a box of the whole tensor inside `at`."""
        to = tuple(
            (start - a + t, stop - a + t) for (start, stop), (a, _), (t, _) in zip(box, self.at, self.to, strict=True)
        )
        return Piece(self.source, box, to)


Layout = dict[str, tuple[Piece, ...]]
"""Pieces by local tensor name. A tensor that is not in it is the whole tensor of the same name; cells that no piece
covers are zero."""


def whole(source: str, shape: Iterable[int]) -> tuple[Piece, ...]:
    """All of `source`, of `shape`."""
    full = tuple((0, size) for size in shape)
    return (Piece(source, full, full),)


def part(source: str, shape: Iterable[int], dim: int, at: Range, to: int = 0) -> Piece:
    """`source[..., at, ...]` along `dim`, placed from `to` on."""
    full = [(0, size) for size in shape]
    place = list(full)
    full[dim] = at
    place[dim] = (to, to + at[1] - at[0])
    return Piece(source, tuple(full), tuple(place))


def stacked(parts: Iterable[tuple[str, Shape, Range]], dim: int = 0) -> tuple[Piece, ...]:
    """Parts of several tensors, one after the other along `dim`."""
    pieces: list[Piece] = []
    to = 0
    for source, shape, at in parts:
        pieces.append(part(source, shape, dim, at, to))
        to += at[1] - at[0]
    return tuple(pieces)


def size(box: Box) -> int:
    """Values in a box."""
    return prod(stop - start for start, stop in box)


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; None: nothing."""
    common: list[Range] = []
    for (a_start, a_stop), (b_start, b_stop) in zip(a, b, strict=True):
        start, stop = max(a_start, b_start), min(a_stop, b_stop)
        if start >= stop:
            return None
        common.append((start, stop))
    return tuple(common)


def without(box: Box, inner: Box) -> Iterator[Box]:
    """Boxes that make up `box` but for `inner`, which lies inside it."""
    rest = list(box)
    for dim, ((start, stop), (first, last)) in enumerate(zip(box, inner, strict=True)):
        for part in ((start, first), (last, stop)):
            if part[0] < part[1]:
                yield (*rest[:dim], part, *rest[dim + 1 :])
        rest[dim] = (first, last)


def portions(box: Box, values_max: int) -> Iterator[Box]:
    """`box` in parts of at most `values_max` values, in the order in which they lie in memory."""
    dim = next((dim for dim, (start, stop) in enumerate(box) if stop - start > 1), None)
    if dim is None or size(box) <= values_max:
        yield box
        return
    start, stop = box[dim]
    step = max(1, values_max // size(box[dim + 1 :]))
    for first in range(start, stop, step):
        part = (*box[:dim], (first, min(first + step, stop)), *box[dim + 1 :])
        yield from portions(part, values_max)
