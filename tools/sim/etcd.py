"""A modelled etcd: revisions, transactions, leases, watches, compaction; outages, restarts and restores of a snapshot.

What was measured of the real one holds here: leases live again in full after a restart, expiry comes up to half a
second late, a restore takes revisions back and brings ghosts of leased keys.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

from controlplane.runtime.etcd_types import (
    Compare,
    Delete,
    EtcdLeaseGone,
    EtcdUnavailable,
    Get,
    KeyValue,
    Op,
    Put,
    Snapshot,
    Target,
    Txn,
    TxnResult,
)
from controlplane.runtime.timing import ETCD_EXPIRY_LAG_S
from tools.sim.kernel import Kernel

HOST = "etcd"
RETRY_MS = 500

Change = tuple[str, KeyValue | None]


@dataclass(slots=True)
class LeaseState:
    id: int
    ttl: int
    expires: float


@dataclass(slots=True)
class Content:
    """What etcd has on disk."""

    revision: int = 1
    keys: dict[str, KeyValue] = field(default_factory=dict[str, KeyValue])
    leases: dict[int, LeaseState] = field(default_factory=dict[int, LeaseState])
    # (revision, key, new state), oldest first.
    history: list[tuple[int, Change]] = field(default_factory=list[tuple[int, Change]])
    compacted: int = 0


Watcher = Callable[[int, tuple[Change, ...]], None]


class Etcd:
    """The cluster as one: all its members, or none, serve."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.up = True
        # The alarm NOSPACE: reads and keepalives only.
        self.read_only = False
        self.delay_s = 0.0
        # Its members elect a leader: calls wait, or are lost.
        self.electing = False
        # Share of the calls that fail, carried out or not.
        self.failing = 0.0
        self.content = Content()
        self.restores = 0
        # Sees every guarded or plain change before it is made.
        self.on_txn: Callable[[Txn, bool], None] = lambda txn, succeeded: None
        self.watchers: dict[int, tuple[str, Watcher, Callable[[], None]]] = {}
        self._watch_ids = 0
        self._lease_ids = 1000
        kernel.after(ETCD_EXPIRY_LAG_S, self._expire)

    # ------------------------------------------------------------ operations

    def txn(self, txn: Txn) -> TxnResult:
        content = self.content
        succeeded = all(self._holds(compare) for compare in txn.when)
        ops = txn.success if succeeded else txn.failure
        writes = [op for op in ops if not isinstance(op, Get)]
        if writes and self.read_only:
            raise EtcdUnavailable("etcd has no space", RETRY_MS)
        for op in writes:
            if isinstance(op, Put) and op.lease and op.lease not in content.leases:
                raise EtcdLeaseGone(f"lease {op.lease}")
        self.on_txn(txn, succeeded)
        if writes:
            content.revision += 1
        reads = [content.keys.get(op.key) for op in ops if isinstance(op, Get)]
        self._commit([change for op in writes if (change := self._apply(op)) is not None])
        return TxnResult(succeeded=succeeded, revision=content.revision, reads=tuple(reads))

    def get_prefix(self, prefix: str) -> Snapshot:
        items = tuple(item for key, item in sorted(self.content.keys.items()) if key.startswith(prefix))
        return Snapshot(revision=self.content.revision, items=items)

    def grant(self, ttl: int) -> tuple[int, int]:
        """Id and granted seconds."""
        if self.read_only:
            raise EtcdUnavailable("etcd has no space", RETRY_MS)
        self._lease_ids += 1
        self.content.leases[self._lease_ids] = LeaseState(self._lease_ids, ttl, self.kernel.now + ttl)
        return self._lease_ids, ttl

    def keepalive(self, lease: int) -> int:
        """Seconds it lives on; 0 if it is gone."""
        state = self.content.leases.get(lease)
        if state is None:
            return 0
        state.expires = self.kernel.now + state.ttl
        return state.ttl

    def remaining(self, lease: int) -> int:
        """Seconds left; -1 if it is gone."""
        state = self.content.leases.get(lease)
        return -1 if state is None else max(0, int(state.expires - self.kernel.now))

    def revoke(self, lease: int) -> None:
        if self.content.leases.pop(lease, None) is None:
            return
        hung = [key for key, item in self.content.keys.items() if item.lease == lease]
        if hung:
            self.content.revision += 1
            for key in hung:
                del self.content.keys[key]
            self._commit([(key, None) for key in hung])

    def watch(self, prefix: str, after: int, watcher: Watcher, ended: Callable[[], None]) -> int:
        """Follow changes above revision `after`. Raises EtcdUnavailable if they are compacted."""
        if after < self.content.compacted:
            raise EtcdUnavailable("compacted", RETRY_MS)
        self._watch_ids += 1
        self.watchers[self._watch_ids] = prefix, watcher, ended
        for revision, change in self.content.history:
            if revision > after and change[0].startswith(prefix):
                watcher(revision, (change,))
        return self._watch_ids

    def unwatch(self, number: int) -> None:
        self.watchers.pop(number, None)

    # ------------------------------------------------------------ faults

    def drop_watches(self) -> None:
        """Every watch stream ends."""
        watchers, self.watchers = self.watchers, {}
        for _, _, ended in watchers.values():
            ended()

    def go_down(self) -> None:
        self.up = False
        self.drop_watches()

    def come_up(self) -> None:
        """After a restart all leases live in full again, and an election timeout longer."""
        if not self.up:
            self.up = True
            self._extend_leases()

    def begin_election(self) -> None:
        """Its members have no leader. Watches stay open, and nothing happens that they could tell of."""
        self.electing = True

    def end_election(self) -> None:
        """A new leader of the members gives all leases their time in full."""
        if self.electing:
            self.electing = False
            self._extend_leases()

    def _extend_leases(self) -> None:
        for lease in self.content.leases.values():
            lease.expires = self.kernel.now + lease.ttl + self.kernel.random.uniform(0.5, 2.5)

    def heal(self) -> None:
        """It is up, and serves everything in time."""
        self.come_up()
        self.end_election()
        self.read_only, self.delay_s, self.failing = False, 0.0, 0.0

    def compact(self) -> None:
        self.content.compacted = self.content.revision
        self.content.history.clear()

    def snapshot(self) -> Content:
        return copy.deepcopy(self.content)

    def restore(self, content: Content) -> None:
        """An older state takes this one's place: revisions go back, keys under dead leases are there again."""
        self.restores += 1
        self.content = copy.deepcopy(content)
        for lease in self.content.leases.values():
            lease.expires = self.kernel.now + lease.ttl
        self.drop_watches()

    # ------------------------------------------------------------ inside

    def _holds(self, compare: Compare) -> bool:
        item = self.content.keys.get(compare.key)
        match compare.target:
            case Target.VALUE:
                return item is not None and item.value == compare.operand
            case Target.CREATE_REVISION:
                return (item.create_revision if item else 0) == compare.operand
            case Target.MOD_REVISION:
                return (item.mod_revision if item else 0) == compare.operand
            case Target.VERSION:
                return (item.version if item else 0) == compare.operand

    def _apply(self, op: Op) -> Change | None:
        keys, revision = self.content.keys, self.content.revision
        if isinstance(op, Delete):
            return (op.key, None) if keys.pop(op.key, None) is not None else None
        assert isinstance(op, Put)
        old = keys.get(op.key)
        created, version = (old.create_revision, old.version) if old else (revision, 0)
        keys[op.key] = KeyValue(op.key, op.value, created, revision, version + 1, op.lease)
        return op.key, keys[op.key]

    def _commit(self, changes: list[Change]) -> None:
        revision = self.content.revision
        self.content.history += [(revision, change) for change in changes]
        for prefix, watcher, _ in list(self.watchers.values()):
            seen = tuple(change for change in changes if change[0].startswith(prefix))
            if seen:
                watcher(revision, seen)

    def _expire(self) -> None:
        self.kernel.after(ETCD_EXPIRY_LAG_S, self._expire)
        if self.up and not self.electing:
            for lease in [lease for lease in self.content.leases.values() if lease.expires <= self.kernel.now]:
                self.kernel.tell("etcd", "lease_expired", lease=lease.id)
                self.revoke(lease.id)
