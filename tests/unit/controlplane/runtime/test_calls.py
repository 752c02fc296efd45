"""However a call ends, its reader and its writer hear it as one exception."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from controlplane.runtime.calls import StreamEnded, read_frame, write_frame
from protos.perdure.v1 import session_pb2, session_pb2_grpc


class Refusing(session_pb2_grpc.SessionServicer):
    """Answers with one frame and an error."""

    async def Attach(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        yield session_pb2.AttachResponse()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the leader goes")


@pytest.fixture
async def call() -> AsyncIterator[Any]:
    server = grpc.aio.server()
    session_pb2_grpc.add_SessionServicer_to_server(Refusing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield session_pb2_grpc.SessionStub(channel).Attach()
    await server.stop(None)


async def test_a_call_that_ended_takes_no_frame(call: Any) -> None:
    await read_frame(call)
    over = asyncio.Event()
    call.add_done_callback(lambda _: over.set())
    await over.wait()
    with pytest.raises(StreamEnded, match="ended before all was written"):
        await write_frame(call, session_pb2.AttachRequest())


async def test_a_reader_hears_why_a_call_ended(call: Any) -> None:
    assert await read_frame(call) == session_pb2.AttachResponse()
    with pytest.raises(StreamEnded, match="UNAVAILABLE: the leader goes"):
        await read_frame(call)
