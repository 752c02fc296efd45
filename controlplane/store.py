"""etcd as the coordinator sees it: typed records in, events out, and writes that only the leader can make."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import Protocol, TypeVar

import msgspec
import structlog

from controlplane.core.messages import DeploymentChanged, NodeKeyChanged, PeersChanged, StoreLoaded
from controlplane.runtime.clock import Clock
from controlplane.runtime.cluster import ensure_cluster
from controlplane.runtime.errors import FencedError
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_types import (
    Compare,
    Delete,
    EtcdDenied,
    EtcdUnavailable,
    Get,
    KeyValue,
    Op,
    Put,
    Txn,
    mod_revision_is,
    value_is,
)
from controlplane.runtime.etcd_watch import PrefixWatch, WatchBatch
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId
from controlplane.runtime.keys import Keys
from controlplane.runtime.messages.common import Reason, ReasonKind, TimingSpec
from controlplane.runtime.records import (
    ClusterRecord,
    DeploymentRecord,
    LeaderRecord,
    NodeRecord,
    PeerRecord,
    PlacementRecord,
    from_json,
    to_json,
)
from controlplane.runtime.timing import Timings

T = TypeVar("T")

log = structlog.get_logger()

WRITE_ATTEMPTS_MAX = 4
DENIED_RETRY_MS = 1000


@dataclass(frozen=True, slots=True)
class PlacementChanged:
    replica: ReplicaId
    record: PlacementRecord | None


StoreEvent = StoreLoaded | NodeKeyChanged | DeploymentChanged | PlacementChanged | PeersChanged


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreState:
    """All that stands below the cluster's prefix at `revision`."""

    revision: int
    cluster: ClusterRecord | None
    leader: LeaderRecord | None
    nodes: Mapping[NodeId, NodeRecord]
    deployments: Mapping[DeploymentId, DeploymentRecord]
    placements: Mapping[ReplicaId, PlacementRecord]
    peers: Mapping[str, PeerRecord]
    deleted: frozenset[DeploymentId]


class Guard(Protocol):
    """Leadership as the store needs it; an Election is one."""

    @property
    def leader_value(self) -> bytes | None: ...

    @property
    def trusted(self) -> bool: ...

    def doubt(self) -> None: ...


class Store:
    """Reads, and writes guarded by the leader key's value: a zombie's change nothing.

    Calls raise EtcdUnavailable (Retryable) when etcd cannot serve them; such a write may have happened.
    """

    def __init__(
        self, client: EtcdClient, keys: Keys, guard: Guard, timings: Timings, clock: Clock, random: Random
    ) -> None:
        self._client = client
        self._keys = keys
        self._guard = guard
        self._timings = timings
        self._clock = clock
        self._random = random
        self._timeout = timings.session_silence
        self._retry_ms = round(timings.reconnect_max * 1000)

    async def ensure_cluster(self, timing: TimingSpec) -> ClusterRecord:
        """The cluster's record, written now if there is none. What stands there wins; a differing timing is reported.
        Raises EtcdDenied too."""
        return await ensure_cluster(self._client, self._keys, timing, timeout=self._timeout)

    async def load(self) -> StoreState:
        """Everything at one revision. Raises EtcdDenied too."""
        snapshot = await self._client.get_prefix(self._keys.prefix, timeout=self._timeout)
        content = {item.key: item for item in snapshot.items}
        return _state(self._keys, snapshot.revision, content)

    async def follow(self, name: str) -> AsyncGenerator[StoreEvent]:
        """StoreLoaded first, and again after every lost connection; changes between. Never ends. `name` is this
        process's own, which is not among the peers. To be closed (`aclosing`)."""
        watch = PrefixWatch(self._client, self._keys.prefix, self._timings, self._clock, self._random)
        view = StoreView(self._keys, name)
        async with aclosing(watch.batches()) as batches:
            async for batch in batches:
                for event in view.take(batch):
                    yield event

    async def write_placement(self, record: PlacementRecord) -> bool:
        """False: this process no longer leads. Raises FencedError if etcd holds a higher epoch of the replica."""
        key = self._keys.placement(record.replica)
        for _ in range(WRITE_ATTEMPTS_MAX):
            stored = await self._get(key)
            placed = _read(stored, PlacementRecord)
            if placed is not None and placed.epoch > record.epoch:
                text = f"{record.replica}: epoch {record.epoch} after epoch {placed.epoch}"
                raise FencedError(Reason(kind=ReasonKind.STALE_EPOCH, text=text))
            revision = stored.mod_revision if stored is not None else 0
            written = await self._write(Put(key, to_json(record)), when=(mod_revision_is(key, revision),))
            if written is not None:
                return written
        raise EtcdUnavailable(f"{key} changes too fast to be written", self._retry_ms)

    async def delete_placement(self, replica: ReplicaId) -> bool:
        """False: this process no longer leads. Deleting what is not there succeeds."""
        return await self._write(Delete(self._keys.placement(replica))) is True

    async def write_deployment(self, record: DeploymentRecord) -> bool:
        """False: this process no longer leads."""
        put = Put(self._keys.deployment(record.deployment), to_json(record))
        return await self._write(put, Delete(self._keys.deleted_deployment(record.deployment))) is True

    async def delete_deployment(self, deployment: DeploymentId) -> bool:
        """Leaves word that it was deleted. False: this process no longer leads."""
        put = Put(self._keys.deleted_deployment(deployment), b"")
        return await self._write(Delete(self._keys.deployment(deployment)), put) is True

    async def revoke_lease(self, lease: int) -> None:
        """End a lease and delete its keys. One that is gone already counts as revoked. etcd cannot guard this by the
        leader key: a leader whose own lease is not fresh is refused here, as if etcd were away."""
        if not self._guard.trusted:
            raise EtcdUnavailable("our own lease may be over: nothing is revoked", self._retry_ms)
        await _served(self._client.lease_revoke(lease, timeout=self._timeout))

    async def _get(self, key: str) -> KeyValue | None:
        return await _served(self._client.get(key, timeout=self._timeout))

    async def _write(self, *ops: Op, when: tuple[Compare, ...] = ()) -> bool | None:
        """Write under the leader's guard. False: the guard failed; None: one of the conditions `when` did."""
        ours = self._guard.leader_value
        if ours is None:
            return False
        leader = self._keys.leader
        txn = Txn(when=(value_is(leader, ours), *when), success=ops, failure=(Get(leader),))
        result = await _served(self._client.txn(txn, timeout=self._timeout))
        if result.succeeded:
            return True
        stands = result.reads[0]
        if stands is not None and stands.value == ours:
            return None
        log.warning("write_refused", key=ops[0].key, reason="the leader key is not ours")
        self._guard.doubt()
        return False


class StoreView:
    """The prefix as records, and what a batch of changes means. `name` is the reader's own, never among the peers."""

    def __init__(self, keys: Keys, name: str) -> None:
        self._keys = keys
        self._name = name
        self._peers: frozenset[str] = frozenset()

    def take(self, batch: WatchBatch) -> list[StoreEvent]:
        if batch.content is not None:
            return [self._load(batch.revision, batch.content, restored=batch.restored)]
        events = [event for key, item in batch.changes if (event := self._event(key, item))]
        peers = self._peers
        for key, item in batch.changes:
            if name := _below(self._keys.peers, key):
                peers = peers - {name} if item is None else peers | {name}
        peers -= {self._name}
        if peers != self._peers:
            self._peers = peers
            events.append(PeersChanged(peers))
        return events

    def _load(self, revision: int, content: Mapping[str, KeyValue], *, restored: bool) -> StoreLoaded:
        state = _state(self._keys, revision, content)
        self._peers = frozenset(state.peers) - {self._name}
        return StoreLoaded(
            nodes=state.nodes,
            deployments=state.deployments,
            placements=state.placements,
            peers=self._peers,
            restored=restored,
            deleted=state.deleted,
        )

    def _event(self, key: str, item: KeyValue | None) -> StoreEvent | None:
        """None also for a record that cannot be read: what stood there before still holds."""
        if node := _below(self._keys.nodes, key):
            record = _read(item, NodeRecord)
            return NodeKeyChanged(NodeId(node), record) if record or item is None else None
        if deployment := _below(self._keys.deployments, key):
            record = _read(item, DeploymentRecord)
            return DeploymentChanged(DeploymentId(deployment), record) if record or item is None else None
        if replica := _below(self._keys.placements, key):
            record = _read(item, PlacementRecord)
            return PlacementChanged(ReplicaId(replica), record) if record or item is None else None
        return None


def _state(keys: Keys, revision: int, content: Mapping[str, KeyValue]) -> StoreState:
    return StoreState(
        revision=revision,
        cluster=_read(content.get(keys.cluster), ClusterRecord),
        leader=_read(content.get(keys.leader), LeaderRecord),
        nodes={NodeId(name): record for name, record in _records(content, keys.nodes, NodeRecord)},
        deployments={
            DeploymentId(name): record for name, record in _records(content, keys.deployments, DeploymentRecord)
        },
        placements={ReplicaId(name): record for name, record in _records(content, keys.placements, PlacementRecord)},
        peers=dict(_records(content, keys.peers, PeerRecord)),
        deleted=frozenset(DeploymentId(name) for key in content if (name := _below(keys.deleted, key))),
    )


def _records(content: Mapping[str, KeyValue], prefix: str, cls: type[T]) -> Iterator[tuple[str, T]]:
    for key, item in content.items():
        if (name := _below(prefix, key)) and (record := _read(item, cls)) is not None:
            yield name, record


def _read(item: KeyValue | None, cls: type[T]) -> T | None:
    """None for an absent key, and for a record that cannot be read, which is reported."""
    if item is None:
        return None
    try:
        return from_json(item.value, cls)
    except msgspec.DecodeError as error:
        log.error("record_unreadable", key=item.key, reason=str(error))
        return None


def _below(prefix: str, key: str) -> str:
    """The name after `prefix`; "" if `key` is not below it."""
    return key[len(prefix) :] if key.startswith(prefix) else ""


async def _served(call: Awaitable[T]) -> T:
    """A user whose rights end while we run is one more way for etcd to be away."""
    try:
        return await call
    except EtcdDenied as error:
        raise EtcdUnavailable(error.reason.text, retry_ms=DENIED_RETRY_MS) from error
