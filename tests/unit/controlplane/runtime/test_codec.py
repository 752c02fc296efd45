"""Definitions that differ are refused at import; frames that break the protocol are refused by field."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import pytest

from controlplane.runtime.codec import Codec, Envelope, UnknownBody, WireError
from controlplane.runtime.messages import session
from controlplane.runtime.messages.common import Permit, Reason, ReasonKind, Sampling
from controlplane.runtime.wire import ATTACH_UP
from protos.perdure.v1 import common_pb2, session_pb2

REASON = Codec(Reason, common_pb2.Reason)
PERMIT = Codec(Permit, common_pb2.Permit)


@dataclass(frozen=True)
class Lacking:
    cluster: str


class Kind(IntEnum):
    ONLY = 1


@dataclass(frozen=True)
class Odd:
    """Reason's fields with an enum of its own."""

    kind: Kind
    text: str
    node: str
    rank: int | None
    group: str
    collective: int | None


def test_a_field_on_one_side_only_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Lacking and perdure\.v1\.Drained differ in \['cluster'\]"):
        Codec(Lacking, session_pb2.Drained)
    with pytest.raises(TypeError, match="boot_id"):
        Codec(Lacking, session_pb2.WorkerHello)


def test_an_enum_of_other_values_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Kind and perdure\.v1\.ReasonKind have different values"):
        Codec(Odd, common_pb2.Reason)


def test_a_union_of_other_bodies_is_refused() -> None:
    with pytest.raises(TypeError, match=r"AttachRequest and its union differ in .*Fenced"):
        Envelope(session_pb2.AttachRequest, session.WorkerHello | session.Drained)


def test_an_unspecified_enum_is_refused_by_field() -> None:
    with pytest.raises(WireError, match=r"perdure\.v1\.Reason\.kind has the value 0"):
        REASON.from_proto(common_pb2.Reason(text="why"))


def test_an_unknown_enum_value_is_refused_by_field() -> None:
    frame = common_pb2.Reason.FromString(b"\x08\xe7\x07")
    with pytest.raises(WireError, match=r"Reason\.kind has the value 999"):
        REASON.from_proto(frame)


def test_a_missing_required_message_is_refused_by_field() -> None:
    with pytest.raises(WireError, match=r"perdure\.v1\.Relet\.reason is missing"):
        Codec(session.Relet, session_pb2.Relet).from_proto(session_pb2.Relet())


def test_a_body_that_this_version_does_not_know_is_told_apart() -> None:
    # Field 1000 of the envelope, as a newer peer might send it.
    frame = session_pb2.AttachRequest.FromString(b"\xc2\x3e\x00")
    with pytest.raises(UnknownBody, match="AttachRequest without a known body"):
        ATTACH_UP.decode(frame)


def test_an_absent_optional_is_none_and_a_zero_is_zero() -> None:
    absent = Reason(kind=ReasonKind.ADMIN)
    zero = Reason(kind=ReasonKind.ADMIN, rank=0, collective=0)
    assert REASON.from_proto(REASON.to_proto(absent)).rank is None
    assert REASON.from_proto(REASON.to_proto(zero)) == zero


def test_a_fields_absence_from_the_bytes_is_its_default() -> None:
    frame = common_pb2.Permit(request="r", attempt=1, replica="a", epoch=2, term=3, mode=1)
    permit = PERMIT.from_proto(frame)
    assert permit.solo is False
    assert permit.priority == 0


def test_maps_are_plain_dictionaries() -> None:
    codec = Codec(Sampling, common_pb2.Sampling)
    sampling = codec.from_proto(codec.to_proto(Sampling(logit_bias={7: -1.5})))
    assert type(sampling.logit_bias) is dict
    assert sampling.logit_bias == {7: -1.5}


def test_a_value_outside_its_fields_range_is_refused() -> None:
    with pytest.raises(ValueError, match="out of range"):
        PERMIT.to_proto(
            Permit(request="r", attempt=2**32, replica="a", epoch=1, term=1)  # type: ignore[arg-type]
        )
