"""Servicer of Session.Attach: the leader's end of a worker daemon's session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from controlplane.core.messages import WorkerSaid
from controlplane.leader_stream import SessionStreams
from controlplane.runtime.messages.session import WorkerHello
from controlplane.runtime.wire import ATTACH_DOWN, ATTACH_UP
from protos.perdure.v1 import session_pb2_grpc


class SessionServicer(session_pb2_grpc.SessionServicer):
    """Attach: frames of worker daemons, in and out of the coordinator."""

    def __init__(self, streams: SessionStreams) -> None:
        self._streams = streams

    async def Attach(
        self, request_iterator: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        async for frame in self._streams.serve(
            request_iterator, context, up=ATTACH_UP, down=ATTACH_DOWN, hello_type=WorkerHello, said=WorkerSaid
        ):
            yield frame
