"""Conversion between protobuf messages and the protocol's dataclasses, derived from both definitions.

A `Codec` pairs a frozen dataclass with the message of the same fields and refuses at import any field that
stands on one side only, so that `to_proto`/`from_proto` are total without being written by hand. Decoding
refuses what the protocol refuses: an enum left UNSPECIFIED or of an unknown value, and a missing required
sub-message.
"""
# pyright: basic

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, Generic, TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

T = TypeVar("T")
Convert = Callable[[Any], Any]


class WireError(ValueError):
    """A received message breaks the protocol; the text names the field."""


class UnknownBody(WireError):
    """A frame whose body this version does not know: skip it, the peer is newer."""


class Codec(Generic[T]):
    """Both directions for one dataclass. Raises TypeError at construction if the two definitions differ."""

    def __init__(self, cls: type[T], proto: type[Message]) -> None:
        self._cls = cls
        self._proto = proto
        descriptor: Any = proto.DESCRIPTOR
        hints = typing.get_type_hints(cls)
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if names != set(descriptor.fields_by_name):
            odd = names ^ set(descriptor.fields_by_name)
            raise TypeError(f"{cls.__name__} and {descriptor.full_name} differ in {sorted(odd)}")
        self._fields = [_Field(descriptor, name, hints[name]) for name in descriptor.fields_by_name]

    def to_proto(self, value: T) -> Any:
        """The protobuf message of `value`."""
        arguments: dict[str, Any] = {}
        for field in self._fields:
            item = getattr(value, field.name)
            if item is not None:
                arguments[field.name] = field.encode(item) if field.encode else item
        return self._proto(**arguments)

    def from_proto(self, message: Any) -> T:
        """The dataclass of `message`. Raises WireError."""
        return self._cls(**{field.name: field.read(message) for field in self._fields})


class Envelope:
    """A stream's frame: a `oneof body` over dataclasses, told apart by their type."""

    def __init__(self, proto: type[Message], bodies: Any) -> None:
        self._proto = proto
        members: Any = proto.DESCRIPTOR.oneofs_by_name["body"].fields
        by_message = {field.message_type.name: field for field in members}
        classes = {cls.__name__: cls for cls in typing.get_args(bodies)}
        if set(by_message) != set(classes):
            raise TypeError(f"{proto.DESCRIPTOR.full_name} and its union differ in {set(by_message) ^ set(classes)}")
        self._by_class = {
            cls: (by_message[name].name, codec_of(cls, by_message[name].message_type)) for name, cls in classes.items()
        }
        self._by_field = dict(self._by_class.values())
        self._head = proto.DESCRIPTOR.fields_by_name.get("head")

    def encode(self, body: Any, head: Any = None) -> Any:
        """The envelope around `body`, with `head` where the stream has one."""
        field, codec = self._by_class[type(body)]
        frame: dict[str, Any] = {field: codec.to_proto(body)}
        if head is not None:
            assert self._head is not None, "this stream's frames have no head"
            frame["head"] = codec_of(type(head), self._head.message_type).to_proto(head)
        return self._proto(**frame)

    def decode(self, frame: Any) -> Any:
        """The body of `frame`. Raises WireError, as UnknownBody for one that this version does not know."""
        field = frame.WhichOneof("body")
        if field is None:
            raise UnknownBody(f"{self._proto.DESCRIPTOR.name} without a known body")
        return self._by_field[field].from_proto(getattr(frame, field))


_codecs: dict[type, Codec[Any]] = {}


def codec_of(cls: type[T], descriptor: Any) -> Codec[T]:
    """The codec of `cls`, made at its first use; `cls` must always be paired with the same message."""
    codec = _codecs.get(cls)
    if codec is None:
        codec = _codecs[cls] = Codec(cls, GetMessageClass(descriptor))
    return codec


class _Field:
    """One field of a codec: how to encode a value that is not None, and how to read it from a message."""

    def __init__(self, descriptor: Descriptor, name: str, hint: Any) -> None:
        self.name = name
        self._where = f"{descriptor.full_name}.{name}"
        field = descriptor.fields_by_name[name]
        self._presence = field.has_presence
        inner, self._optional = _strip_optional(hint)
        origin = typing.get_origin(inner)
        if origin is Mapping or origin is dict or getattr(origin, "__name__", "") == "Mapping":
            self.encode: Convert | None = dict
            self.read = lambda message: dict(getattr(message, name))
        elif origin is tuple:
            encode, decode = self._item(typing.get_args(inner)[0], field)
            self.encode = (lambda items: [encode(item) for item in items]) if encode else None
            self.read = lambda message: (
                tuple(map(decode, getattr(message, name))) if decode else tuple(getattr(message, name))
            )
        else:
            self.encode, decode = self._item(inner, field)
            self.read = self._reader(decode)

    def _reader(self, decode: Convert | None) -> Convert:
        name = self.name
        if not self._presence:
            return (
                (lambda message: decode(getattr(message, name))) if decode else (lambda message: getattr(message, name))
            )

        def read(message: Any) -> Any:
            if not message.HasField(name):
                if self._optional:
                    return None
                raise WireError(f"{self._where} is missing")
            value = getattr(message, name)
            return decode(value) if decode else value

        return read

    def _item(self, hint: Any, field: Any) -> tuple[Convert | None, Convert | None]:
        if dataclasses.is_dataclass(hint):
            codec = codec_of(typing.cast(type, hint), field.message_type)
            return codec.to_proto, codec.from_proto
        if isinstance(hint, type) and issubclass(hint, IntEnum):
            _check_enum(hint, field)
            return int, self._enum_reader(hint)
        return None, None

    def _enum_reader(self, enum: type[IntEnum]) -> Convert:
        members = {member.value: member for member in enum}

        def read(value: int) -> IntEnum:
            if value not in members:
                raise WireError(f"{self._where} has the value {value}, which is unspecified or unknown")
            return members[value]

        return read


def _check_enum(enum: type[IntEnum], field: Any) -> None:
    declared = {value.number for value in field.enum_type.values if value.number != 0}
    if declared != {member.value for member in enum}:
        raise TypeError(f"{enum.__name__} and {field.enum_type.full_name} have different values")


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        assert len(inner) == 1, f"unsupported union {hint}"
        return inner[0], True
    return hint, False
