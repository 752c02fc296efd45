"""Who leads, for everyone who wants to reach the leader: gateways, worker daemons, other candidates."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from random import Random

import msgspec
import structlog

from controlplane.runtime.clock import Clock
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_types import KeyValue
from controlplane.runtime.etcd_watch import PrefixWatch
from controlplane.runtime.ids import Incarnation, Term
from controlplane.runtime.keys import Keys
from controlplane.runtime.records import LeaderRecord, from_json
from controlplane.runtime.timing import Timings

log = structlog.get_logger()


class LeaderWatch:
    """Follows the leader key; while etcd is away keeps what it saw last and takes hints from frames."""

    def __init__(self, client: EtcdClient, keys: Keys, timings: Timings, clock: Clock, random: Random) -> None:
        self._key_name = keys.leader
        self._watch = PrefixWatch(client, keys.leader, timings, clock, random)
        self._key: KeyValue | None = None
        self._current: LeaderRecord | None = None
        self._highest_term = Term(0)
        # Who leads, or led, in the highest term that a leader was met in.
        self._met: tuple[Term, Incarnation] | None = None
        self._hint: tuple[Term, str] | None = None
        self._changed = asyncio.Event()

    @property
    def current(self) -> LeaderRecord | None:
        """The leader as etcd last said; None: nobody leads, or etcd was never reached."""
        return self._current

    @property
    def key(self) -> KeyValue | None:
        """The leader key that `current` was read from."""
        return self._key

    @property
    def highest_term(self) -> Term:
        """Highest term met anywhere: in etcd or in a frame."""
        return self._highest_term

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where to look for the leader, highest term first; a hint may know better than an etcd that is away."""
        known: list[tuple[Term, str]] = []
        if self._current is not None:
            known.append((self._current.term, self._current.address))
        if self._hint is not None:
            known.append(self._hint)
        return tuple(dict.fromkeys(address for _, address in sorted(known, reverse=True)))

    async def changed(self) -> None:
        """Return at the next change of anything above. Look first, then wait."""
        await self._changed.wait()

    def hint(self, address: str, term: Term) -> None:
        """A frame named a term, and the leader's address or "" with it."""
        known = max(self._highest_term, term)
        better = address and term > (self._hint[0] if self._hint else 0)
        if better and (self._current is None or term > self._current.term):
            self._hint = (term, address)
        elif known == self._highest_term:
            return
        self._highest_term = known
        self._notify()

    def meet(self, term: Term, incarnation: Incarnation) -> None:
        """Somebody leads in `term`. Should another have led in it, before etcd was restored and all candidates that
        knew of it died, the term is good for nobody: whoever leads in it hears of a higher one."""
        if self._met is None or term > self._met[0]:
            self._met = (term, incarnation)
        elif (term, incarnation) != self._met and term == self._met[0]:
            self.hint("", Term(term + 1))

    async def run(self) -> None:
        """Eternal. Raises nothing that etcd causes."""
        async with aclosing(self._watch.batches()) as batches:
            async for batch in batches:
                for key, item in batch.changes:
                    if key == self._key_name:
                        self._see(item)

    def _see(self, item: KeyValue | None) -> None:
        self._key = item
        self._current = read_leader(item) if item is not None else None
        if self._current is not None:
            self._highest_term = max(self._highest_term, self._current.term)
            self.meet(self._current.term, self._current.incarnation)
            if self._hint is not None and self._hint[0] <= self._current.term:
                self._hint = None
            log.info("leader_seen", leader=self._current.name, term=self._current.term, address=self._current.address)
        else:
            log.info("leader_gone", highest_term=self._highest_term)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def read_leader(item: KeyValue) -> LeaderRecord | None:
    """The record in the leader key; None if it cannot be read."""
    try:
        return from_json(item.value, LeaderRecord)
    except msgspec.DecodeError as error:
        log.warning("record_unreadable", key=item.key, reason=str(error))
        return None
