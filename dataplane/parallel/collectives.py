"""Exchanges of plain data, and of many small tensors as one.

Plain data is anything that msgspec encodes: no pickle on any wire. Reductions combine numbers, or equal structures of
numbers, leaf by leaf.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from dataplane.parallel.groups import MAX, MEAN, MIN, SUM, Group

T = TypeVar("T")

_HEAD_BYTES = 8
_FIRST_BYTES = 4096
"""Data up to this size goes in the first message; longer data follows in a second one."""

_encode = msgspec.msgpack.encode


def broadcast_data(group: Group, value: T | None, source: int, type: type[T] | Any = Any, patient: bool = False) -> T:
    """Member `source`'s `value` on every member. `patient`: without a deadline, as a rank waits for its next work."""
    if group.size == 1:
        return value  # type: ignore[return-value]
    body = _encode(value) if group.index == source else b""
    first = (len(body).to_bytes(_HEAD_BYTES, "little") + body)[:_FIRST_BYTES].ljust(_FIRST_BYTES, b"\0")
    head = as_bytes(group.broadcast(as_tensor(first, group), source, patient=patient))
    length = int.from_bytes(head[:_HEAD_BYTES], "little")
    data = head[_HEAD_BYTES : _HEAD_BYTES + length]
    if len(data) < length:
        rest = as_tensor(body[len(data) :].ljust(length - len(data), b"\0"), group)
        data += as_bytes(group.broadcast(rest, source))
    return msgspec.msgpack.decode(data, type=type)


def all_gather_data(group: Group, value: T, type: type[T] | Any = Any) -> list[T]:
    """Every member's `value`, in order of members."""
    body = _encode(value)
    if group.size == 1:
        return [value]
    lengths: list[int] = group.all_gather(torch.tensor(len(body), device=group.device)).tolist()
    parts = group.all_gather(as_tensor(body.ljust(max(lengths), b"\0"), group))
    return [
        msgspec.msgpack.decode(as_bytes(part)[:length], type=type) for part, length in zip(parts, lengths, strict=True)
    ]


def reduce_data(group: Group, value: T, operation: str = SUM, to: int | None = None) -> T | None:
    """The members' values combined leaf by leaf, on every member, or on `to` alone (None elsewhere)."""
    values = all_gather_data(group, value)
    return _combine(values, _LEAVES[operation]) if to in (None, group.index) else None


_LEAVES: dict[str, Callable[[list[Any]], Any]] = {
    SUM: lambda items: math.fsum(items) if any(isinstance(item, float) for item in items) else sum(items),
    MEAN: lambda items: math.fsum(items) / len(items),
    MAX: max,
    MIN: min,
}


def _combine(values: list[Any], leaf: Callable[[list[Any]], Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _combine([value[key] for value in values], leaf) for key in first}
    if isinstance(first, list | tuple):
        return [_combine(list(items), leaf) for items in zip(*values, strict=True)]
    return leaf(values)


def all_reduce_many(group: Group, tensors: Sequence[Tensor], operation: str = SUM) -> list[Tensor]:
    """Each tensor combined over the group, in one exchange a dtype instead of one a tensor."""
    by_dtype: dict[torch.dtype, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        by_dtype[tensor.dtype].append(index)
    results: list[Tensor] = list(tensors)
    for indices in by_dtype.values():
        joined = torch.cat([tensors[index].reshape(-1) for index in indices])
        parts = group.all_reduce(joined, operation).split([tensors[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            results[index] = part.view(tensors[index].shape)
    return results


def as_tensor(data: bytes, group: Group) -> Tensor:
    """`data` where `group` exchanges tensors."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(group.device)


def as_bytes(data: Tensor) -> bytes:
    """The way back."""
    return data.cpu().numpy().tobytes()
