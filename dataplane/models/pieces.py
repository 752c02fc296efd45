"""Where a local tensor's values come from: pieces of the model's whole, unsharded tensors.

Surgery writes down pieces as it cuts; loading reads them. The names are those of the transformers model's own state
dict, before any surgery; `checkpoint.py` leads from them to the tensors on disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dataplane.parallel.split import Range

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """`local[to] = whole[at]`: a box of the tensor `source`, both ranges of the same lengths."""

    source: str
    at: tuple[Range, ...]
    to: tuple[Range, ...]

    def __post_init__(self) -> None:
        assert [b - a for a, b in self.at] == [b - a for a, b in self.to], self


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
