"""Deliberate bugs in shells: what the cores cannot see."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

import controlplane.runtime.actor
import dataplane.coordinator_link
from controlplane.runtime.actor import Mailbox, MailboxFull, TaskReturned
from controlplane.runtime.wire import SERVE_DOWN
from dataplane.gateway_link import GatewayStream


@dataclass(frozen=True, slots=True)
class ShellMutant:
    """`apply` makes the bug; `seed` or one soon after it finds it, and part of the error says how."""

    name: str
    apply: Callable[[pytest.MonkeyPatch], None]
    seed: int
    shows_as: str


def room_tells_nobody(patch: pytest.MonkeyPatch) -> None:
    """Who waits for room in a full mailbox is not woken when there is some."""

    def take(self: Mailbox[Any]) -> Any:
        key, item = self._items.popleft()
        return item if key is None else self._latest.pop(key)

    patch.setattr(Mailbox, "_take", take)


def wake_up_cleared_too_late(patch: pytest.MonkeyPatch) -> None:
    """The writer forgets what was sent while it wrote: it clears the event after it has looked."""

    async def write(self: GatewayStream, context: Any, on_empty: Callable[[], None]) -> None:
        while True:
            while self._outbox:
                await context.write(SERVE_DOWN.encode(self._outbox.popleft()))
            self._room.set()
            if self.closed_for is not None:
                return
            on_empty()
            self._changed.clear()
            await self._changed.wait()

    patch.setattr(GatewayStream, "write", write)


def cancellation_swallowed(patch: pytest.MonkeyPatch) -> None:
    """A task that is told to end is taken for one that failed, and started again."""

    async def eternal(name: str, run: Callable[[], Awaitable[None]]) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await run()
        raise TaskReturned(name)

    patch.setattr(controlplane.runtime.actor, "eternal", eternal)


def full_mailbox_drops(patch: pytest.MonkeyPatch) -> None:
    """What comes while it is full is thrown away instead of waiting."""

    async def put(self: Mailbox[Any], item: Any) -> None:
        with contextlib.suppress(MailboxFull):
            self.offer(item)

    patch.setattr(Mailbox, "put", put)


def senders_outlive_the_reader(patch: pytest.MonkeyPatch) -> None:
    """A mailbox whose reader is gone keeps its senders waiting."""
    patch.setattr(Mailbox, "close", lambda self: None)


def late_write_unforeseen(patch: pytest.MonkeyPatch) -> None:
    """What is written to a call that has just ended fails in a way that the link does not know: its daemon ends."""

    async def write_frame(call: Any, frame: Any) -> None:
        await call.write(frame)

    patch.setattr(dataplane.coordinator_link, "write_frame", write_frame)


SHELL_MUTANTS = (
    ShellMutant("room tells nobody", room_tells_nobody, 18, "lost wake-up"),
    ShellMutant("a wake-up is cleared too late", wake_up_cleared_too_late, 1, "lost wake-up"),
    ShellMutant("a cancellation is swallowed", cancellation_swallowed, 0, "still runs"),
    ShellMutant("a full mailbox drops", full_mailbox_drops, 8, ""),
    ShellMutant("senders outlive the reader", senders_outlive_the_reader, 18, "requests are open"),
    ShellMutant("a late write is unforeseen", late_write_unforeseen, 27, "the call has ended"),
)
