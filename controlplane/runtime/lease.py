"""A process's lease in etcd and the key that registers the process under it.

The keeper runs on its owner's main loop, never in a thread: a lease must not outlive a hung loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from random import Random

import structlog

from controlplane.runtime.backoff import Backoff
from controlplane.runtime.clock import Clock
from controlplane.runtime.errors import Rejected
from controlplane.runtime.etcd import ETCD_ERRORS, EtcdClient
from controlplane.runtime.etcd_types import EtcdLeaseGone
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.race import race
from controlplane.runtime.timing import ETCD_EXPIRY_LAG_S, Timings

log = structlog.get_logger()

NEVER = float("-inf")


class LeaseEventKind(Enum):
    RENEWED = "renewed"
    # The lease may have expired: its holder must no longer act on it. etcd has not answered, or refuses us.
    MUTE = "mute"
    # Renewed after a mute.
    HEARD = "heard"
    # etcd answered that the lease is gone, and every key under it.
    GONE = "gone"
    # Registered anew, as the same incarnation.
    RELET = "relet"
    # The name is held by another process, or etcd grants no lease that is short enough. Tried again.
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class LeaseEvent:
    kind: LeaseEventKind
    # 0: none now.
    lease: int
    reason: Reason | None = None


class NameTaken(Rejected):
    """Another live process is registered under our name; the text says which."""


Register = Callable[[int], Awaitable[bool]]
"""Puts the process's key under the given lease. True if it had to write. Raises NameTaken."""


class LeaseKeeper:
    """Grants, renews and re-grants one lease; `register` puts what hangs on it.

    `start`, then `run` for ever, then (with `run` cancelled) `close`. Events go to `on_event`, which must not block.
    """

    def __init__(
        self,
        client: EtcdClient,
        register: Register,
        timings: Timings,
        clock: Clock,
        random: Random,
        on_event: Callable[[LeaseEvent], None],
    ) -> None:
        self._client = client
        self._register = register
        self._timings = timings
        self._clock = clock
        self._on_event = on_event
        self._backoff = Backoff(timings, random)
        self._lease = 0
        # Why the last attempt to renew failed; empty if it did not.
        self.trouble = ""
        self._trusted_until = NEVER
        self._registered = False
        self._muted = False
        self._doubted = False
        self._hurry = asyncio.Event()

    @property
    def lease(self) -> int:
        """Id of the lease; 0 while there is none."""
        return self._lease

    @property
    def trusted_until(self) -> float:
        """Clock time until which etcd surely keeps the lease: send time of the last answered renewal + trust."""
        return self._trusted_until

    @property
    def trusted(self) -> bool:
        """True also means: not muted, not gone. False as soon as the time has passed, before any event says so."""
        return self._clock.now() < self._trusted_until

    def relet(self) -> None:
        """Someone misses our key: look at once, and put it again if it is gone."""
        self._doubted = True
        self._hurry.set()

    async def start(self) -> None:
        """Grant and register. A name that is taken may be a dead predecessor's: waits for its lease to expire once.

        Raises EtcdUnavailable, EtcdDenied, NameTaken, or Rejected if etcd grants no lease this short.
        """
        await self._grant()
        patience_ends = self._clock.now() + self._timings.lease_ttl + ETCD_EXPIRY_LAG_S + self._timings.keepalive_period
        while True:
            try:
                await self._register(self._lease)
                self._registered = True
                return
            except NameTaken:
                if self._clock.now() >= patience_ends:
                    await self.close()
                    raise
            await self._clock.sleep(self._timings.keepalive_period)
            if await self._keepalive(self._timings.keepalive_deadline) == 0:
                await self._grant()

    async def run(self) -> None:
        """Renew for ever. Raises nothing that etcd causes."""
        wait = self._timings.keepalive_period
        while True:
            await race(self._clock.sleep(min(wait, self._trust_left())), self._hurry.wait())
            self._hurry.clear()
            wait = await self._turn()

    async def close(self) -> None:
        """Give the lease back, so that nobody waits for it to expire."""
        lease, self._lease, self._trusted_until = self._lease, 0, NEVER
        if not lease:
            return
        try:
            await self._client.lease_revoke(lease, timeout=self._timings.keepalive_deadline)
        except ETCD_ERRORS as error:
            log.warning("lease_left_to_expire", lease=lease, reason=error.reason.text)

    async def _turn(self) -> float:
        """One attempt at what is due. Seconds until the next."""
        self._check_trust()
        try:
            await self._keep()
        except (*ETCD_ERRORS, EtcdLeaseGone) as error:
            log.debug("lease_not_renewed", lease=self._lease, reason=error.reason.text)
            self.trouble = error.reason.text
            # It may come back restored from a snapshot, with the lease but without the key.
            self._doubted = True
            self._check_trust()
            return self._backoff.next()
        except Rejected as refusal:
            # A lease without its key serves nobody.
            await self.close()
            self._lost()
            self._emit(LeaseEventKind.REFUSED, refusal.reason)
            return self._timings.lease_ttl
        self._backoff.reset()
        self.trouble = ""
        return self._timings.keepalive_period

    async def _keep(self) -> None:
        """Renew the lease, or take a new one if it is gone; put the key where it is missing."""
        if self._lease and await self._keepalive(min(self._timings.keepalive_deadline, self._trust_left())) == 0:
            self._lost()
        if not self._lease:
            await self._grant()
            self._doubted = True
        if self._doubted:
            if await self._register(self._lease):
                self._emit(LeaseEventKind.RELET)
            self._registered = True
            self._doubted = False

    def _trust_left(self) -> float:
        """Seconds until trust ends, a moment that no wait may hide; infinite when it has ended or never began."""
        left = self._trusted_until - self._clock.now()
        return left if left > 0 else float("inf")

    async def _keepalive(self, timeout: float) -> int:
        sent = self._clock.now()
        ttl = await self._client.keepalive_once(self._lease, timeout=timeout)
        if ttl > 0:
            self._trusted_until = sent + self._timings.lease_trust
            self._renewed()
        return ttl

    def _renewed(self) -> None:
        if not self.trusted:
            # Answered, but so late (a stopped process) that the answer says nothing any more.
            self._check_trust()
            return
        kind = LeaseEventKind.HEARD if self._muted else LeaseEventKind.RENEWED
        self._muted = False
        self._emit(kind)

    def _check_trust(self) -> None:
        if self._lease and not self._muted and not self.trusted:
            self._muted = True
            self._emit(LeaseEventKind.MUTE)

    def _lost(self) -> None:
        self._lease = 0
        self._trusted_until = NEVER
        self._muted = False
        if self._registered:
            self._registered = False
            self._emit(LeaseEventKind.GONE)

    async def _grant(self) -> None:
        sent = self._clock.now()
        granted = await self._client.lease_grant(self._timings.lease_ttl, timeout=self._timings.session_silence)
        self._lease = granted.id
        if granted.ttl > self._timings.failure_timeout:
            await self.close()
            text = (
                f"etcd grants no lease below {granted.ttl} s (1.5 × its election timeout, rounded up), but "
                f"failure_timeout is {self._timings.failure_timeout:g} s: raise it, or lower etcd's --election-timeout"
            )
            raise Rejected(Reason(kind=ReasonKind.INVALID, text=text))
        self._trusted_until = sent + self._timings.lease_trust

    def _emit(self, kind: LeaseEventKind, reason: Reason | None = None) -> None:
        if kind is not LeaseEventKind.RENEWED:
            log.info("lease_changed", kind=kind.value, lease=self._lease, reason=reason.text if reason else "")
        self._on_event(LeaseEvent(kind, self._lease, reason))
