"""The streams' frames as protobuf, one `Envelope` a direction.

The only place where dataclasses meet generated types.
"""

from __future__ import annotations

from controlplane.runtime.codec import Envelope
from controlplane.runtime.messages import route, serve, session
from protos.perdure.v1 import route_pb2, serve_pb2, session_pb2

ATTACH_UP = Envelope(session_pb2.AttachRequest, session.AttachUp)
ATTACH_DOWN = Envelope(session_pb2.AttachResponse, session.AttachDown)
ROUTE_UP = Envelope(route_pb2.RouteRequest, route.RouteUp)
ROUTE_DOWN = Envelope(route_pb2.RouteResponse, route.RouteDown)
SERVE_UP = Envelope(serve_pb2.ServeRequest, serve.ServeUp)
SERVE_DOWN = Envelope(serve_pb2.ServeResponse, serve.ServeDown)
