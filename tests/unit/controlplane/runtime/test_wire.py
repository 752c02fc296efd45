"""Every frame of every stream survives the wire, every field of it."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.runtime import wire
from controlplane.runtime.codec import Envelope, codec_of
from controlplane.runtime.ids import SessionId, Term
from controlplane.runtime.messages import route, serve, session
from controlplane.runtime.messages.common import Head
from protos.perdure.v1 import common_pb2, route_pb2, serve_pb2, session_pb2
from tests.support.protocol import messages

STREAMS: list[tuple[str, Envelope, Any, Any]] = [
    ("AttachUp", wire.ATTACH_UP, session_pb2.AttachRequest, session.AttachUp),
    ("AttachDown", wire.ATTACH_DOWN, session_pb2.AttachResponse, session.AttachDown),
    ("RouteUp", wire.ROUTE_UP, route_pb2.RouteRequest, route.RouteUp),
    ("RouteDown", wire.ROUTE_DOWN, route_pb2.RouteResponse, route.RouteDown),
    ("ServeUp", wire.SERVE_UP, serve_pb2.ServeRequest, serve.ServeUp),
    ("ServeDown", wire.SERVE_DOWN, serve_pb2.ServeResponse, serve.ServeDown),
]
FRAMES = [
    pytest.param(envelope, proto, cls, id=f"{name}.{cls.__name__}")
    for name, envelope, proto, union in STREAMS
    for cls in typing.get_args(union)
]


def body_message(proto: Any, cls: type) -> Any:
    """Descriptor of the body that carries `cls`."""
    bodies = proto.DESCRIPTOR.oneofs_by_name["body"].fields
    return next(field.message_type for field in bodies if field.message_type.name == cls.__name__)


@pytest.mark.parametrize(("envelope", "proto", "cls"), FRAMES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_frame_survives_the_wire(envelope: Envelope, proto: Any, cls: type, data: st.DataObject) -> None:
    body = data.draw(messages(cls, body_message(proto, cls)))
    received = proto.FromString(envelope.encode(body).SerializeToString())
    decoded = envelope.decode(received)
    assert type(decoded) is cls
    assert decoded == body


@settings(max_examples=25, deadline=None)
@given(head=messages(Head, common_pb2.Head.DESCRIPTOR))
def test_a_head_rides_on_every_session_frame(head: Head) -> None:
    for envelope, proto, body in (
        (wire.ATTACH_UP, session_pb2.AttachRequest, session.Drained()),
        (wire.ATTACH_DOWN, session_pb2.AttachResponse, session.UndrainNode()),
        (wire.ROUTE_UP, route_pb2.RouteRequest, route.Inventory()),
        (wire.ROUTE_DOWN, route_pb2.RouteResponse, route.LeaderHeartbeat()),
    ):
        received = proto.FromString(envelope.encode(body, head).SerializeToString())
        assert codec_of(Head, common_pb2.Head.DESCRIPTOR).from_proto(received.head) == head
        assert envelope.decode(received) == body


def test_a_stream_without_heads_takes_none() -> None:
    with pytest.raises(AssertionError, match="no head"):
        wire.SERVE_UP.encode(serve.EndRequests(), Head(term=Term(1), session=SessionId(1), seq=1))
