"""Frames on their way into one gRPC stream."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Generic, TypeVar

import grpc.aio

T = TypeVar("T")


class Outbox(Generic[T]):
    """Bounded; its one reader takes everything that is there, so that what came in one turn of the loop can be sent as
    one batch. When full it drops and is `overflowed` from then on: a stream that far behind must be given up."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self.overflowed = False
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._taken = False
        self._readable = asyncio.Event()

    def put(self, item: T) -> None:
        """Append `item`."""
        if len(self._items) >= self._capacity:
            self.overflowed = True
            return
        self._items.append(item)
        self._readable.set()

    @property
    def idle(self) -> bool:
        """Nothing waits, and what was taken last was dealt with: the reader came back for more."""
        return not self._items and not self._taken

    async def take_all(self) -> list[T]:
        """All items, oldest first, waiting for one."""
        self._taken = False
        while not self._items:
            self._readable.clear()
            await self._readable.wait()
        items = list(self._items)
        self._items.clear()
        self._taken = True
        return items


class StreamEnded(Exception):
    """The peer ended the stream, or it broke; the text says what gRPC says."""


async def read_frame(call: Any) -> Any:
    """The next frame. Raises StreamEnded."""
    try:
        frame = await call.read()
    except grpc.aio.AioRpcError as error:
        raise StreamEnded(f"{error.code().name}: {error.details()}") from error
    if frame is grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
        raise StreamEnded("the peer ended the stream")
    return frame


async def write_frame(call: Any, frame: Any) -> None:
    """Write one frame. Raises StreamEnded."""
    try:
        await call.write(frame)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
        raise StreamEnded(f"write failed: {type(error).__name__}") from error
