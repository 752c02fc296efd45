"""Servicer of Routing.Route: the leader's end of a gateway's session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from controlplane.core.messages import GatewaySaid
from controlplane.leader_stream import SessionStreams
from controlplane.runtime.messages.route import GatewayHello
from controlplane.runtime.wire import ROUTE_DOWN, ROUTE_UP
from protos.perdure.v1 import route_pb2_grpc


class RoutingServicer(route_pb2_grpc.RoutingServicer):
    """Route: frames of gateways, in and out of the coordinator."""

    def __init__(self, streams: SessionStreams) -> None:
        self._streams = streams

    async def Route(
        self, request_iterator: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        async for frame in self._streams.serve(
            request_iterator, context, up=ROUTE_UP, down=ROUTE_DOWN, hello_type=GatewayHello, said=GatewaySaid
        ):
            yield frame
