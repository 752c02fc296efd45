"""Leader election: this process's lease, its candidacy, and a standby's watch over the leader's life.

The leader key stands under its holder's lease; its term is an integer set in the election's own transaction, because
revisions go back when etcd is restored. Every guard compares the key's value, which names incarnation and term.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from random import Random

import structlog

from controlplane.leader_guard import LeaderGuard
from controlplane.runtime.actor import Mailbox
from controlplane.runtime.backoff import Backoff
from controlplane.runtime.clock import Clock
from controlplane.runtime.etcd import ETCD_ERRORS, EtcdClient
from controlplane.runtime.etcd_types import (
    Delete,
    EtcdLeaseGone,
    Get,
    KeyValue,
    Put,
    Txn,
    absent,
    mod_revision_is,
    value_is,
)
from controlplane.runtime.ids import Term
from controlplane.runtime.keys import Keys
from controlplane.runtime.leader import LeaderWatch, read_leader
from controlplane.runtime.lease import LeaseEvent, LeaseEventKind, LeaseKeeper
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.race import race
from controlplane.runtime.records import LeaderRecord, PeerRecord, to_json
from controlplane.runtime.registration import Registration
from controlplane.runtime.timing import Timings

log = structlog.get_logger()

EVENTS_MAX = 256


@dataclass(frozen=True, slots=True)
class Won:
    """This process leads in `term`, which no other ever held."""

    term: Term


@dataclass(frozen=True, slots=True)
class Muted:
    """The leader's lease may have expired and etcd does not answer: neither judge nor place (frozen)."""


@dataclass(frozen=True, slots=True)
class Heard:
    """After Muted: etcd renewed the lease and the key is still ours."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Leadership is over; Won may follow, with a higher term."""

    reason: Reason


ElectionEvent = Won | Muted | Heard | Lost


@dataclass(frozen=True, slots=True)
class _Held:
    term: Term
    value: bytes


class Election:
    """One candidate. `start`, then `run` for ever, then (with `run` cancelled) `close`.

    Events alternate: Won, then any number of Muted and Heard, then Lost.
    """

    def __init__(
        self,
        client: EtcdClient,
        keys: Keys,
        candidate: PeerRecord,
        leader: LeaderWatch,
        timings: Timings,
        clock: Clock,
        random: Random,
    ) -> None:
        """`leader` is run by its owner."""
        self._client = client
        self._keys = keys
        self._candidate = candidate
        self._leader = leader
        self._timings = timings
        self._clock = clock
        self._backoff = Backoff(timings, random)
        # News wakes the candidate; it looks by itself only in case that news was lost.
        self._unless_woken = timings.failure_timeout
        registration = Registration(client, keys.peer(candidate.name), lambda _: candidate, timings)
        self._keeper = LeaseKeeper(client, registration, timings, clock, random, self._on_lease)
        self._events: Mailbox[ElectionEvent] = Mailbox("election", EVENTS_MAX)
        self._wake = asyncio.Event()
        self._held: _Held | None = None
        self._doubted = False
        self._muted = False
        # A key of ours that no longer counts and may still stand in etcd.
        self._leftover: bytes | None = None
        self._pause_until = 0.0
        self._highest_term = Term(0)
        self._guard = LeaderGuard(leader, candidate.incarnation, self._revoke, timings, clock, random)

    @property
    def term(self) -> Term | None:
        """The term that this process leads in; None: it does not."""
        return self._held.term if self._held is not None else None

    @property
    def leader_value(self) -> bytes | None:
        """What the leader key must hold for our writes to count; None while this process does not lead."""
        return self._held.value if self._held is not None else None

    @property
    def trusted(self) -> bool:
        """True while this process leads and its lease is fresh: it may judge and place. Right at every moment, also
        just after the process was stopped for a while, before any event says so."""
        return self._held is not None and self._keeper.trusted

    @property
    def trouble(self) -> str:
        """Why etcd does not renew this process's lease; empty if it does."""
        return self._keeper.trouble

    async def events(self) -> AsyncGenerator[ElectionEvent]:
        """For the one reader."""
        while True:
            yield await self._events.get()

    async def start(self) -> None:
        """Take a lease and register as a peer. Raises EtcdUnavailable, EtcdDenied, NameTaken or Rejected."""
        await self._keeper.start()

    async def run(self) -> None:
        """Eternal. Raises nothing that etcd causes."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keeper.run())
            tasks.create_task(self._stand())
            tasks.create_task(self._follow_key())
            tasks.create_task(self._guard.run())

    async def close(self) -> None:
        """Give up key and lease, so that a standby takes over at once."""
        self._held = None
        await self._keeper.close()

    async def step_down(self, reason: Reason, pause_s: float, highest_term: Term) -> None:
        """Stop leading now; stand again after `pause_s` seconds, above `highest_term`."""
        self._highest_term = max(self._highest_term, highest_term)
        if self._held is None:
            return
        self._pause_until = self._clock.now() + pause_s
        self._leftover = self._held.value
        self._lose(reason)

    def doubt(self) -> None:
        """A guarded write failed on the leader key: look whether it is still ours."""
        self._doubted = True
        self._wake.set()

    # ------------------------------------------------------------ news

    def _on_lease(self, event: LeaseEvent) -> None:
        if event.kind is LeaseEventKind.RENEWED:
            return
        self._wake.set()
        if self._held is None:
            return
        match event.kind:
            case LeaseEventKind.GONE:
                self._lose(Reason(kind=ReasonKind.LEASE_EXPIRED, text="the leader's lease is gone"))
            case LeaseEventKind.MUTE:
                self._mute()
            case LeaseEventKind.HEARD:
                self._doubted = True
            case _:
                pass

    async def _follow_key(self) -> None:
        while True:
            key = self._leader.key
            if self._held is not None and (key is None or key.value != self._held.value):
                self._doubted = True
            self._wake.set()
            await self._leader.changed()

    # ------------------------------------------------------------ standing and holding

    async def _stand(self) -> None:
        while True:
            self._wake.clear()
            try:
                wait = await self._turn()
                self._backoff.reset()
            except (*ETCD_ERRORS, EtcdLeaseGone) as error:
                log.debug("election_delayed", reason=error.reason.text)
                wait = self._backoff.next()
            await race(self._wake.wait(), self._clock.sleep(wait))

    async def _turn(self) -> float:
        """Do what is due; seconds until there may be more, unless woken."""
        if self._leftover is not None:
            await self._delete(self._leftover)
            self._leftover = None
        if self._held is not None:
            return await self._hold(self._held)
        pause = self._pause_until - self._clock.now()
        if pause > 0:
            return pause
        if not self._keeper.trusted:
            return self._unless_woken
        return await self._campaign()

    async def _hold(self, held: _Held) -> float:
        met = self._leader.highest_term
        if met > held.term:
            text = f"term {met} was met while leading in term {held.term}"
            await self.step_down(Reason(kind=ReasonKind.STALE_TERM, text=text), 0.0, met)
            return 0.0
        if self._doubted:
            await self._verify(held)
        return self._unless_woken

    async def _verify(self, held: _Held) -> None:
        key = await self._client.get(self._keys.leader, timeout=self._timings.keepalive_deadline)
        if self._held is not held:
            return
        self._doubted = False
        if key is None or key.value != held.value:
            self._lose(Reason(kind=ReasonKind.NOT_LEADER, text=f"the leader key is {_owner(key)}"))
        elif self._muted and self._keeper.trusted:
            self._muted = False
            self._emit(Heard())

    async def _campaign(self) -> float:
        """Try to become leader if nobody is."""
        read = Txn(when=(), success=(Get(self._keys.leader), Get(self._keys.term)))
        leader, stored = (await self._client.txn(read, timeout=self._timings.keepalive_deadline)).reads
        if leader is not None:
            return await self._meet(leader)
        stored_term = int(stored.value) if stored is not None else 0
        term = Term(max(stored_term, self._highest_term, self._leader.highest_term) + 1)
        value = to_json(self._record(term))
        if not self._keeper.trusted:
            # Lost while we read: a key under no lease would never go, and nobody could ever lead again.
            return self._unless_woken
        lease = self._keeper.lease
        win = Txn(
            when=(absent(self._keys.leader), mod_revision_is(self._keys.term, stored.mod_revision if stored else 0)),
            success=(Put(self._keys.leader, value, lease), Put(self._keys.term, str(term).encode())),
        )
        result = await self._client.txn(win, timeout=self._timings.keepalive_deadline)
        if not result.succeeded:
            return self._backoff.next()
        # A lease lost meanwhile took the key with it.
        self._doubted = self._keeper.lease != lease
        self._win(_Held(term, value))
        return 0.0 if self._doubted else self._unless_woken

    async def _meet(self, leader: KeyValue) -> float:
        """Somebody holds the key. Wait for the watch to say that it is gone, unless it is an older self: the outcome of
        a transaction that was never answered, or a ghost out of a restored snapshot."""
        record = read_leader(leader)
        if record is not None and record.incarnation == self._candidate.incarnation:
            self._leftover = leader.value
            return 0.0
        return self._unless_woken if self._leader.key is not None else self._backoff.next()

    async def _delete(self, value: bytes) -> None:
        """Delete the leader key if it still holds `value`."""
        txn = Txn(when=(value_is(self._keys.leader, value),), success=(Delete(self._keys.leader),))
        await self._client.txn(txn, timeout=self._timings.keepalive_deadline)

    async def _revoke(self, lease: int) -> None:
        await self._client.lease_revoke(lease, timeout=self._timings.keepalive_deadline)

    # ------------------------------------------------------------ changes of state, each with its event

    def _win(self, held: _Held) -> None:
        log.info("election_won", term=held.term)
        self._held = held
        self._muted = False
        self._emit(Won(held.term))
        if not self._keeper.trusted:
            self._mute()

    def _lose(self, reason: Reason) -> None:
        assert self._held is not None
        log.warning("election_lost", term=self._held.term, reason=reason.text)
        self._held = None
        self._muted = False
        self._emit(Lost(reason))
        self._wake.set()

    def _mute(self) -> None:
        self._muted = True
        self._emit(Muted())

    def _emit(self, event: ElectionEvent) -> None:
        self._events.offer(event)

    def _record(self, term: Term) -> LeaderRecord:
        return LeaderRecord(
            name=self._candidate.name,
            incarnation=self._candidate.incarnation,
            term=term,
            address=self._candidate.address,
            pid=self._candidate.pid,
        )


def _owner(key: KeyValue | None) -> str:
    record = read_leader(key) if key is not None else None
    return "gone" if record is None else f"held by {record.name} in term {record.term}"
