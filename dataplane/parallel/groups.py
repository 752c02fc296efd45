"""A named group of ranks and the exchanges its members make."""

from __future__ import annotations

from torch import Tensor


class Group:
    """Ranks that exchange tensors, in order. Of size 1 every exchange is the identity."""

    def __init__(self, name: str, ranks: tuple[int, ...], rank: int) -> None:
        self.name = name
        self.ranks = ranks
        self.index = ranks.index(rank)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the group."""
        assert self.size == 1
        return x
