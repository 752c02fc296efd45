"""Mailboxes and supervision: every mutable object has one owner, and talking to it means sending to its mailbox."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import structlog

from controlplane.runtime.clock import Clock

T = TypeVar("T")

log = structlog.get_logger()


class MailboxFull(Exception):
    """The mailbox refused an item: its owner is behind by `capacity` items."""


class Mailbox(Generic[T]):
    """A bounded queue with one reader. Each way of sending says what happens when it is full:
    `put` waits, `offer` refuses, `put_latest` keeps only the newest item of a key."""

    def __init__(self, name: str, capacity: int) -> None:
        assert capacity > 0
        self.name = name
        self.capacity = capacity
        self.dropped = 0
        self._items: deque[tuple[Hashable | None, T]] = deque()
        self._latest: dict[Hashable, T] = {}
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: T) -> None:
        """Append `item`, waiting for room."""
        while len(self._items) >= self.capacity and not self._closed:
            self._writable.clear()
            await self._writable.wait()
        self._append(None, item)

    def offer(self, item: T) -> None:
        """Append `item` or raise MailboxFull."""
        if len(self._items) >= self.capacity:
            self.dropped += 1
            raise MailboxFull(self.name)
        self._append(None, item)

    def put_latest(self, key: Hashable, item: T) -> None:
        """Append `item`, or replace the unread item of the same key in place. Bounded by the number of keys."""
        if key in self._latest:
            self.dropped += 1
            self._latest[key] = item
            return
        self._latest[key] = item
        self._append(key, item)

    async def get(self) -> T:
        """The oldest item, waiting for one. For the one reader."""
        while not self._items:
            self._readable.clear()
            await self._readable.wait()
        return self._take()

    def drain(self, limit: int) -> list[T]:
        """Up to `limit` items that are there now, oldest first."""
        return [self._take() for _ in range(min(limit, len(self._items)))]

    def close(self) -> None:
        """Nobody reads any more: what is there and whatever is sent from now on is dropped, and no sender waits."""
        self._closed = True
        self.dropped += len(self._items)
        self._items.clear()
        self._latest.clear()
        self._writable.set()

    def _append(self, key: Hashable | None, item: T) -> None:
        if self._closed:
            self.dropped += 1
            self._latest.clear()
            return
        self._items.append((key, item))
        self._readable.set()

    def _take(self) -> T:
        key, item = self._items.popleft()
        self._writable.set()
        return item if key is None else self._latest.pop(key)


class TaskReturned(Exception):
    """A task that should be eternal came to its end."""


async def eternal(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run what must never end. Raises TaskReturned if it does; its own exceptions pass through."""
    await run()
    raise TaskReturned(name)


async def supervise(
    name: str,
    run: Callable[[], Awaitable[None]],
    clock: Clock,
    *,
    restarts_max: int = 5,
    window_s: float = 60.0,
    backoff_s: float = 0.1,
) -> None:
    """Keep an eternal task running: restart it with jittered backoff, at most `restarts_max` times in `window_s`
    seconds; then its last exception ends the caller too."""
    failures: deque[float] = deque()
    while True:
        try:
            await eternal(name, run)
        except Exception as error:
            now = clock.now()
            failures.append(now)
            while now - failures[0] > window_s:
                failures.popleft()
            if len(failures) > restarts_max:
                raise
            log.exception("task_failed", task=name, failures=len(failures), error=str(error))
            await clock.sleep(backoff_s * 2 ** (len(failures) - 1) * random.uniform(0.8, 1.2))
