"""Servicer of Serving.Serve: the worker's end of each gateway's stream.

Nothing is decided here. Tokens never queue up: the core makes the next message only when the last one has left. The
few frames that answer the gateway's own do queue, and while too many wait the gateway's frames are not read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import structlog

from controlplane.runtime.codec import UnknownBody, WireError
from controlplane.runtime.messages.common import Reason
from controlplane.runtime.messages.serve import ServeDown, ServeHello
from controlplane.runtime.timing import Timings
from controlplane.runtime.wire import SERVE_DOWN, SERVE_UP
from dataplane.core.messages import Event, GatewayClosed, GatewayOpened, GatewaySaid, GatewayWritable, StreamId
from protos.perdure.v1 import serve_pb2_grpc

log = structlog.get_logger()

OUTBOX_FRAMES_MAX = 1024
"""While more frames wait to be written, none is read."""

Context = grpc.aio.ServicerContext[Any, Any]


class GatewayStream:
    """One stream: frames to write, in order."""

    def __init__(self, stream: StreamId, gateway: str) -> None:
        self.stream = stream
        self.gateway = gateway
        self._outbox: deque[ServeDown] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.closed_for: Reason | None = None

    def send(self, body: ServeDown) -> None:
        self._outbox.append(body)
        if len(self._outbox) > OUTBOX_FRAMES_MAX:
            self._room.clear()
        self._changed.set()

    def close(self, reason: Reason) -> None:
        """End the stream after what was sent before."""
        self.closed_for = reason
        self._changed.set()

    async def room(self) -> None:
        """Wait until the gateway has read enough to be heard again."""
        await self._room.wait()

    async def write(self, context: Context, on_empty: Callable[[], None]) -> None:
        """Write until closed; `on_empty` may send more, and hears each time that all has left."""
        while True:
            self._changed.clear()
            while self._outbox:
                await context.write(SERVE_DOWN.encode(self._outbox.popleft()))
            self._room.set()
            if self.closed_for is not None:
                return
            on_empty()
            await self._changed.wait()


class ServingServicer(serve_pb2_grpc.ServingServicer):
    """Serve: frames of gateways, in and out of the core."""

    def __init__(self, timings: Timings, post: Callable[[Event], None]) -> None:
        self._timings = timings
        self._post = post
        self._streams: dict[StreamId, GatewayStream] = {}
        self._next = 1
        self._idle = asyncio.Event()
        self._idle.set()
        self._leaving = False

    def send(self, stream: StreamId, body: ServeDown) -> None:
        """Queue a frame; a stream that is gone takes none."""
        target = self._streams.get(stream)
        if target is not None:
            target.send(body)

    def close(self, stream: StreamId, reason: Reason) -> None:
        """End the stream after what was sent before."""
        target = self._streams.get(stream)
        if target is not None:
            target.close(reason)

    async def leave(self, reason: Reason) -> None:
        """Take no new streams, and end those that are open after what was sent on them, within a session's silence."""
        self._leaving = True
        for stream in self._streams.values():
            stream.close(reason)
        try:
            async with asyncio.timeout(self._timings.session_silence):
                await self._idle.wait()
        except TimeoutError:
            log.warning("gateway_streams_abandoned", streams=len(self._streams))

    async def Serve(self, request_iterator: AsyncIterator[Any], context: Context) -> None:
        """One gateway's stream, from its Hello to its end."""
        if self._leaving:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is leaving")
        hello = await self._hello(request_iterator, context)
        stream = GatewayStream(StreamId(self._next), hello.name)
        self._next += 1
        self._streams[stream.stream] = stream
        self._idle.clear()
        log.info("gateway_connected", gateway=hello.name, stream=stream.stream)
        try:
            self._post(GatewayOpened(stream.stream, hello))
            await self._converse(stream, request_iterator, context)
        finally:
            del self._streams[stream.stream]
            if not self._streams:
                self._idle.set()
            self._post(GatewayClosed(stream.stream))
            log.info("gateway_disconnected", gateway=hello.name, stream=stream.stream)
        if stream.closed_for is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, stream.closed_for.text)

    async def _hello(self, frames: AsyncIterator[Any], context: Context) -> ServeHello:
        try:
            async with asyncio.timeout(self._timings.stage):
                async for frame in frames:
                    hello = SERVE_UP.decode(frame)
                    if isinstance(hello, ServeHello):
                        return hello
                    break
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello in time")
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a stream begins with ServeHello")

    async def _converse(self, stream: GatewayStream, frames: AsyncIterator[Any], context: Context) -> None:
        """Read and write until either ends."""
        reader = asyncio.create_task(self._read(stream, frames))
        writer = asyncio.create_task(stream.write(context, lambda: self._post(GatewayWritable(stream.stream))))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            writer.cancel()
            outcomes = await asyncio.gather(reader, writer, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, WireError):
                log.warning("frame_refused", gateway=stream.gateway, error=str(outcome))
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(outcome))
            elif isinstance(outcome, AssertionError):
                raise outcome

    async def _read(self, stream: GatewayStream, frames: AsyncIterator[Any]) -> None:
        async for frame in frames:
            try:
                body = SERVE_UP.decode(frame)
            except UnknownBody:
                log.warning("frame_skipped", gateway=stream.gateway)
                continue
            self._post(GatewaySaid(stream.stream, body))
            await stream.room()
