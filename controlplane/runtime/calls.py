"""Frames in and out of a streaming gRPC call, as a client: however it ends, one exception says so."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc.aio

_EOF = cast("object", getattr(grpc.aio, "EOF"))  # noqa: B009 - the stubs do not know it


class StreamEnded(Exception):
    """The peer ended the stream, or it broke; the text says what gRPC says."""


async def read_frame(call: Any) -> Any:
    """The next frame. Raises StreamEnded."""
    try:
        frame = await call.read()
    except grpc.aio.AioRpcError as error:
        raise StreamEnded(_words(error)) from error
    if frame is _EOF:
        raise StreamEnded("the peer ended the stream")
    return frame


async def write_frame(call: Any, frame: Any) -> None:
    """Write one frame. Raises StreamEnded."""
    try:
        await call.write(frame)
    except grpc.aio.AioRpcError as error:
        raise StreamEnded(_words(error)) from error
    except asyncio.InvalidStateError as error:
        # The call is over, and its reader will hear why.
        raise StreamEnded("ended before all was written") from error


def _words(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"
