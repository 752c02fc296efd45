"""A standby's watch over the leader's life: proof of death ends the leader's lease at once instead of at its TTL."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random

import structlog

from controlplane.runtime.backoff import Backoff
from controlplane.runtime.clock import Clock
from controlplane.runtime.etcd import ETCD_ERRORS
from controlplane.runtime.ids import Incarnation
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.probe import PeerConnection, refused_twice
from controlplane.runtime.race import race
from controlplane.runtime.records import LeaderRecord
from controlplane.runtime.timing import Timings

log = structlog.get_logger()


class LeaderGuard:
    """Keeps a connection to whoever leads. When it worked, broke, and the port refuses twice: revokes that lease."""

    def __init__(
        self,
        leader: LeaderWatch,
        ours: Incarnation,
        revoke: Callable[[int], Awaitable[None]],
        timings: Timings,
        clock: Clock,
        random: Random,
    ) -> None:
        self._leader = leader
        self._ours = ours
        self._revoke = revoke
        self._timings = timings
        self._clock = clock
        self._backoff = Backoff(timings, random)
        # One proof each: whose address refuses and who then speaks again is judged by its lease alone.
        self._proven: set[Incarnation] = set()

    async def run(self) -> None:
        """Eternal."""
        while True:
            record, key = self._leader.current, self._leader.key
            if record is None or key is None or record.incarnation in (self._ours, *self._proven):
                await self._leader.changed()
            else:
                await race(self._guard(record, key.lease), self._leader.changed())

    async def _guard(self, record: LeaderRecord, lease: int) -> None:
        """Return when the leader is proven dead and its lease revoked."""
        connection = PeerConnection(record.address, self._timings)
        try:
            await connection.until_it_works()
            log.info("leader_guarded", leader=record.name, term=record.term, address=record.address)
            while True:
                await connection.until_it_breaks()
                if await self._refused(record) and await self._end(record, lease):
                    return
                await self._clock.sleep(self._backoff.next())
        finally:
            await connection.close()

    async def _refused(self, record: LeaderRecord) -> bool:
        return await refused_twice(record.address, self._timings, self._clock)

    async def _end(self, record: LeaderRecord, lease: int) -> bool:
        try:
            await self._revoke(lease)
        except ETCD_ERRORS as error:
            log.warning("leader_not_revoked", leader=record.name, term=record.term, reason=error.reason.text)
            return False
        self._proven.add(record.incarnation)
        log.warning("leader_proven_dead", leader=record.name, term=record.term, address=record.address)
        return True
