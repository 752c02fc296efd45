"""What a cluster says of itself during a round, read all along: a leader's log and its failures end with its term."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from protos.perdure.v1 import admin_pb2
from tools.chaos.live import ChaosError, LiveCluster

PERIOD_S = 0.5
SAME_S = 2.5
"""An answer takes at most two seconds."""

CLOCKS_APART_S = 600.0
"""Who says that something happened so long before it was read, or later, has a clock that was set."""


class Chronicle:
    """Of one round. `begin`, then `follow` beside the round, then `read` once more."""

    def __init__(self, cluster: LiveCluster) -> None:
        self._cluster = cluster
        self._begun = 0.0
        # Events that were there before.
        self._past: set[_Key] = set()
        # (when it was noticed, the record as it was last).
        self._failures: list[tuple[float, admin_pb2.FailureStatus]] = []
        # (when it happened, the event).
        self._events: dict[_Key, tuple[float, admin_pb2.EventsResponse]] = {}

    async def begin(self) -> None:
        """What was before is of no interest."""
        self._past = {_key(event) for event in await self._cluster.events()}
        self._begun = time.monotonic()

    async def follow(self) -> None:
        """Eternal."""
        while True:
            with suppress(ChaosError):
                await self.read()
            await asyncio.sleep(PERIOD_S)

    async def read(self) -> None:
        """Raises ChaosError if nobody answers."""
        found, now = await self._cluster.failures(), time.monotonic()
        for failure in found:
            noticed = now - failure.age_ms / 1000
            if noticed >= self._begun:
                self._failures = [item for item in self._failures if not _same(item, noticed, failure)]
                self._failures.append((noticed, failure))
        for event in await self._cluster.events():
            # One who did not answer in `begin` tells of what was before, too.
            if _key(event) not in self._past and (happened := _happened(event)) >= self._begun - SAME_S:
                self._events.setdefault(_key(event), (happened, event))

    @property
    def failures(self) -> list[tuple[float, admin_pb2.FailureStatus]]:
        """(time.monotonic when it was noticed, the record as it was last)."""
        return sorted(self._failures, key=lambda item: item[0])

    @property
    def events(self) -> list[tuple[float, admin_pb2.EventsResponse]]:
        """(time.monotonic, the event), oldest first."""
        return sorted(self._events.values(), key=lambda row: row[0])


_Key = tuple[int, int, str, str, str]


def _key(event: admin_pb2.EventsResponse) -> _Key:
    """A process that shares another's log file has its events too, under other numbers."""
    return event.term, event.wall_ms, event.name, event.node, event.replica


def _happened(event: admin_pb2.EventsResponse) -> float:
    """time.monotonic of an event that was read just now for the first time."""
    age_s = time.time() - event.wall_ms / 1000
    return time.monotonic() - (age_s if abs(age_s) < CLOCKS_APART_S else 0.0)


def _same(item: tuple[float, admin_pb2.FailureStatus], noticed: float, failure: admin_pb2.FailureStatus) -> bool:
    """Read twice: the same life of a replica, noticed at the same time but for what the answer took."""
    before, other = item
    return (other.replica, other.epoch) == (failure.replica, failure.epoch) and abs(before - noticed) < SAME_S
