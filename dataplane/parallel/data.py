"""Data parallelism: a batch spread over replicas, results gathered in order, gradients averaged.

Parts are contiguous and as equal as they can be: part i of the batch goes to member i, so that gathering in order of
members gives back the batch's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from dataplane.parallel.collectives import all_gather_data, all_reduce_many, as_bytes, as_tensor
from dataplane.parallel.groups import MEAN, Group
from dataplane.parallel.split import cut

T = TypeVar("T")


def scatter_data(group: Group, items: Sequence[T] | None, source: int = 0, type: Any = Any) -> list[T]:
    """This member's part of the plain data `items` that member `source` has. `type`: of one item."""
    if group.size == 1:
        return list(items or ())
    bodies = [b""] * group.size
    if group.index == source:
        assert items is not None
        parts = [items[slice(*cut(len(items), group.size, member))] for member in range(group.size)]
        bodies = [msgspec.msgpack.encode(list(part)) for part in parts]
    joined = as_tensor(b"".join(bodies) or b"\0", group)
    mine = _spread(group, joined, [len(body) for body in bodies], source)
    return msgspec.msgpack.decode(as_bytes(mine), type=_list_of(type))


def scatter_rows(group: Group, rows: Tensor | None, like: Tensor, source: int = 0) -> Tensor:
    """This member's part of the rows of a tensor that member `source` has. `like`: dtype and trailing shape."""
    if group.size == 1:
        assert rows is not None
        return rows
    counts = [0] * group.size
    if group.index == source:
        assert rows is not None
        counts = [stop - start for start, stop in (cut(len(rows), group.size, i) for i in range(group.size))]
    return _spread(group, like.new_empty(0, *like.shape[1:]) if rows is None else rows, counts, source)


def gather_data(group: Group, items: Sequence[T], type: Any = Any) -> list[T]:
    """All members' items as one list, in order of members."""
    return list(chain.from_iterable(all_gather_data(group, list(items), _list_of(type))))


def gather_rows(group: Group, rows: Tensor) -> Tensor:
    """All members' rows, in order of members; members may have different numbers of them."""
    counts = group.all_gather(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = group.all_gather(padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def average_gradients(group: Group, gradients: Sequence[Tensor]) -> list[Tensor]:
    """The mean over members of each gradient, in one exchange a dtype."""
    return all_reduce_many(group, gradients, MEAN)


def _list_of(type: Any) -> Any:
    return Any if type is Any else list[type]


def _spread(group: Group, x: Tensor, counts: list[int], source: int) -> Tensor:
    """Member `source`'s rows of `x`, `counts[i]` of them to member i."""
    told = group.broadcast(torch.tensor(counts, device=x.device), source).tolist()
    received = [0] * group.size
    received[source] = told[group.index]
    sent = told if group.index == source else [0] * group.size
    return group.all_to_all(x[: sum(sent)], sent, received)
