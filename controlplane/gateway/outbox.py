"""Frames on their way into one gRPC stream."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

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
