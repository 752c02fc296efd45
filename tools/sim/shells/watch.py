"""What must hold of shells at every moment: nobody sleeps over what is there for him, no task fails unseen, and no task
outlives its process."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Callable, Generator
from random import Random
from typing import Any
from weakref import WeakSet

import grpc.aio

import controlplane.connection
import controlplane.coordinator
import controlplane.gateway.leader_link
import controlplane.gateway.worker_stream
import dataplane.coordinator_link
import dataplane.daemon
import dataplane.gateway_link
from controlplane.gateway.feed import Feed
from controlplane.gateway.outbox import Outbox
from controlplane.runtime.actor import Mailbox
from dataplane.gateway_link import GatewayStream
from tools.sim.kernel import Kernel
from tools.sim.shells.hosts import HousePool
from tools.sim.shells.wires import Wires

CHECKED_EVERY_S = 0.02
"""Virtual seconds between two looks at all queues; a sleeper that nobody wakes sleeps on."""

Waited = tuple[asyncio.Event, Callable[[], bool]]
"""An event, and whether what it stands for is there."""


class Sleepers:
    """All queues of the world, each with the events that its readers and writers wait for."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._due = 0.0
        self._queues: WeakSet[Any] = WeakSet()

    def check(self) -> None:
        """To be called when every task waits. Raises AssertionError for a lost wake-up."""
        if self._kernel.now < self._due:
            return
        self._due = self._kernel.now + CHECKED_EVERY_S
        for queue in self._queues:
            for event, there in _waits_of(queue):
                waits = bool(event._waiters)  # type: ignore[attr-defined]
                assert not (waits and not event.is_set() and there()), f"lost wake-up: {_name(queue)}"

    @contextlib.contextmanager
    def watching(self) -> Generator[None]:
        """Every queue made within is known."""
        with contextlib.ExitStack() as stack:
            for kind in (Mailbox, Outbox, GatewayStream, Feed):
                stack.enter_context(replaced(kind, "__init__", self._noting(kind.__init__)))
            yield

    def _noting(self, original: Callable[..., None]) -> Callable[..., None]:
        def init(queue: Any, *arguments: Any, **options: Any) -> None:
            original(queue, *arguments, **options)
            self._queues.add(queue)

        return init


def _waits_of(queue: Any) -> list[Waited]:
    match queue:
        case Mailbox():
            return [
                (queue._readable, lambda: len(queue) > 0),
                (queue._writable, lambda: len(queue) < queue.capacity),
            ]
        case Outbox():
            return [(queue._readable, lambda: bool(queue._items))]
        case GatewayStream():
            room = dataplane.gateway_link.OUTBOX_FRAMES_MAX
            return [
                (queue._changed, lambda: bool(queue._outbox) or queue.closed_for is not None),
                (queue._room, lambda: len(queue._outbox) == 0 and room > 0),
            ]
        case Feed():
            return [(queue._news, lambda: bool(queue._pieces))]
        case _:
            raise AssertionError(queue)


def _name(queue: Any) -> str:
    return f"{type(queue).__name__} {getattr(queue, 'name', '')}"


@contextlib.contextmanager
def replaced(holder: Any, name: str, value: Any) -> Generator[None]:
    """`holder.name` is `value` within."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextlib.contextmanager
def in_memory(wires: Wires, dice: Random, capacity: int, frames: int) -> Generator[None]:
    """Shells made within talk through `wires`, draw from `dice`, and have queues of these sizes."""
    with contextlib.ExitStack() as stack:
        for holder, name, value in (
            (grpc.aio, "insecure_channel", wires.channel),
            (grpc.aio, "server", wires.server),
            (dataplane.daemon, "RankPool", HousePool),
            (controlplane.coordinator, "MAILBOX_ITEMS_MAX", capacity),
            (controlplane.connection, "OUTBOX_FRAMES_MAX", frames),
            (controlplane.gateway.leader_link, "OUTBOX_MAX", frames),
            (controlplane.gateway.worker_stream, "OUTBOX_MAX", frames),
            (dataplane.coordinator_link, "OUTBOX_FRAMES_MAX", frames),
            (dataplane.gateway_link, "OUTBOX_FRAMES_MAX", frames),
            (random, "Random", _seeded(dice)),
            (random, "uniform", dice.uniform),
            (secrets, "randbits", dice.getrandbits),
        ):
            stack.enter_context(replaced(holder, name, value))
        yield


def _seeded(dice: Random) -> Callable[..., Random]:
    def make(seed: Any = None) -> Random:
        return Random(dice.getrandbits(64) if seed is None else seed)

    return make
