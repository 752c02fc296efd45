"""Hypothesis strategies for the protocol's dataclasses, derived from their fields and, on the wire, their messages."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import strategies as st

_BOUNDS = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
}
ITEMS_MAX = 3


def messages(cls: type, descriptor: Descriptor) -> st.SearchStrategy[Any]:
    """Every value of `cls` that its message can carry."""
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{name: _field(hints[name], field) for name, field in descriptor.fields_by_name.items()})


def records(cls: type) -> st.SearchStrategy[Any]:
    """Values of `cls` whose integers fit 63 bits and whose numbers are finite, as JSON holds them."""
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{field.name: _plain(hints[field.name]) for field in dataclasses.fields(cls)})


def _field(hint: Any, field: FieldDescriptor) -> st.SearchStrategy[Any]:
    inner, optional = _strip(hint)
    origin = typing.get_origin(inner)
    if origin is Mapping:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        key_hint, value_hint = typing.get_args(inner)
        return st.dictionaries(_scalar(key_hint, key), _scalar(value_hint, value), max_size=ITEMS_MAX)
    if origin is tuple:
        return st.lists(_scalar(typing.get_args(inner)[0], field), max_size=ITEMS_MAX).map(tuple)
    value = _scalar(inner, field)
    return st.none() | value if optional else value


def _scalar(hint: Any, field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if dataclasses.is_dataclass(hint):
        return messages(typing.cast(type, hint), field.message_type)
    if field.type in _BOUNDS and not _is_enum(hint):
        low, high = _BOUNDS[field.type]
        return st.integers(low, high)
    if field.type == FieldDescriptor.TYPE_FLOAT:
        return st.floats(width=32, allow_nan=False)
    return _plain(hint)


def _plain(hint: Any) -> st.SearchStrategy[Any]:
    inner, optional = _strip(hint)
    if optional:
        return st.none() | _plain(inner)
    if dataclasses.is_dataclass(inner):
        return records(typing.cast(type, inner))
    if _is_enum(inner):
        return st.sampled_from(list(inner))
    if typing.get_origin(inner) is tuple:
        return st.lists(_plain(typing.get_args(inner)[0]), max_size=ITEMS_MAX).map(tuple)
    base = inner
    while hasattr(base, "__supertype__"):
        base = base.__supertype__
    return {
        bool: st.booleans(),
        int: st.integers(0, 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(max_size=8),
        bytes: st.binary(max_size=8),
    }[base]


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, IntEnum)


def _strip(hint: Any) -> tuple[Any, bool]:
    """The hint without `| None`, and whether it had it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (inner,) = [part for part in typing.get_args(hint) if part is not type(None)]
        return inner, True
    return hint, False
