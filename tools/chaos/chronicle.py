"""What a cluster says of itself during a round, read all along: a leader's log and its failures end with its term."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from protos.perdure.v1 import admin_pb2
from tools.chaos.live import ChaosError, LiveCluster

PERIOD_S = 0.5


class Chronicle:
    """Of one round. `begin`, then `follow` beside the round, then `read` once more."""

    def __init__(self, cluster: LiveCluster) -> None:
        self._cluster = cluster
        self._begun_ms = 0.0
        self._begun = 0.0
        self._known: set[tuple[str, int]] = set()
        self._failures: dict[tuple[str, int], tuple[float, admin_pb2.FailureStatus]] = {}
        self._events: dict[tuple[int, int], admin_pb2.EventsResponse] = {}

    async def begin(self) -> None:
        """What failed before is of no interest. Raises ChaosError."""
        self._known = {_key(failure) for failure in await self._cluster.failures()}
        self._begun_ms, self._begun = time.time() * 1000, time.monotonic()

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
            if _key(failure) not in self._known:
                self._failures[_key(failure)] = (now - failure.age_ms / 1000, failure)
        for event in await self._cluster.events():
            if event.wall_ms >= self._begun_ms:
                self._events[event.term, event.seq] = event

    @property
    def failures(self) -> list[tuple[float, admin_pb2.FailureStatus]]:
        """(time.monotonic when it was noticed, the record as it was last)."""
        return sorted(self._failures.values(), key=lambda item: item[0])

    @property
    def events(self) -> list[tuple[float, admin_pb2.EventsResponse]]:
        """(time.monotonic, the event), oldest first."""
        rows = sorted(self._events.values(), key=lambda event: event.wall_ms)
        return [(self._begun + (event.wall_ms - self._begun_ms) / 1000, event) for event in rows]


def _key(failure: admin_pb2.FailureStatus) -> tuple[str, int]:
    return failure.replica, failure.epoch
