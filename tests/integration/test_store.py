"""The coordinator's store on a real etcd: guarded writes, and events that tell what etcd holds."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest

from controlplane.core.messages import DeploymentChanged, NodeKeyChanged, PeersChanged, StoreLoaded
from controlplane.runtime.cluster import read_cluster
from controlplane.runtime.errors import FencedError, Rejected
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_server import EtcdChild
from controlplane.runtime.etcd_types import EtcdUnavailable
from controlplane.runtime.ids import DeploymentId, Epoch, Incarnation, NodeId, ReplicaId, Term, draw_id
from controlplane.runtime.keys import Keys
from controlplane.runtime.messages.common import Member, ReplicaSpec, TimingSpec
from controlplane.runtime.records import (
    DeploymentRecord,
    LeaderRecord,
    NodeRecord,
    PeerRecord,
    PlacementRecord,
    to_json,
)
from controlplane.store import PlacementChanged, Store, StoreEvent
from tests.support.cluster import eventually
from tests.support.etcd import CLOCK, TIMINGS, client_of, restore_snapshot, running, save_snapshot

T = 2.0
DEPLOYMENT = DeploymentRecord(
    deployment=DeploymentId("d"),
    model="m",
    spec=ReplicaSpec(deployment=DeploymentId("d"), model_path="/m"),
    replicas=2,
)
PLACEMENT = PlacementRecord(
    replica=ReplicaId("r1"),
    deployment=DeploymentId("d"),
    epoch=Epoch(3),
    members=(Member(rank=0, node=NodeId("n1"), device="cpu:0", host="h"),),
    term=Term(1),
)
NODE = NodeRecord(
    node=NodeId("n1"),
    incarnation=Incarnation(draw_id()),
    serve_address="h:1",
    host="h",
    pid=1,
    boot_id="b",
    lease_id=7,
)
PEER = PeerRecord(name="b", incarnation=Incarnation(draw_id()), address="h:2", url="http://h:3", pid=2)


@dataclass
class Leadership:
    """The guard of a process that leads, as far as it knows."""

    leader_value: bytes | None
    trusted: bool = True
    doubts: int = 0

    def doubt(self) -> None:
        self.doubts += 1


def leadership(name: str, term: int) -> Leadership:
    record = LeaderRecord(
        name=name, incarnation=Incarnation(draw_id()), term=Term(term), address="h:2", pid=os.getpid()
    )
    return Leadership(to_json(record))


def store_of(client: EtcdClient, keys: Keys, guard: Leadership) -> Store:
    return Store(client, keys, guard, TIMINGS, CLOCK, Random(0))


@pytest.fixture
async def leader(client: EtcdClient, keys: Keys) -> Leadership:
    """The process whose value stands in the leader key."""
    guard = leadership("a", 1)
    await client.put(keys.leader, guard.leader_value or b"", timeout=T)
    return guard


async def test_the_cluster_is_written_once(client: EtcdClient, keys: Keys, leader: Leadership) -> None:
    store = store_of(client, keys, leader)
    assert await read_cluster(client, keys, timeout=T) is None
    first = await store.ensure_cluster(TimingSpec(failure_timeout_ms=3000, heartbeat_interval_ms=500))
    second = await store.ensure_cluster(TimingSpec(failure_timeout_ms=9000, heartbeat_interval_ms=500))
    assert second == first == await read_cluster(client, keys, timeout=T)
    assert first.timing.failure_timeout_ms == 3000


async def test_a_foreign_cluster_key_is_refused(client: EtcdClient, keys: Keys, leader: Leadership) -> None:
    await client.put(keys.cluster, b'{"cluster": 7}', timeout=T)
    with pytest.raises(Rejected, match=r"cluster in etcd is not a cluster's record.*cluster"):
        await store_of(client, keys, leader).ensure_cluster(TIMINGS.to_spec())


async def test_the_leader_writes_and_all_is_read_back(client: EtcdClient, keys: Keys, leader: Leadership) -> None:
    store = store_of(client, keys, leader)
    assert await store.write_deployment(DEPLOYMENT) is True
    assert await store.write_placement(PLACEMENT) is True
    await client.put(keys.node(NODE.node), to_json(NODE), timeout=T)
    await client.put(keys.peer(PEER.name), to_json(PEER), timeout=T)
    state = await store.load()
    assert state.deployments == {"d": DEPLOYMENT}
    assert state.placements == {"r1": PLACEMENT}
    assert state.nodes == {"n1": NODE}
    assert state.peers == {"b": PEER}
    assert state.leader is not None
    assert state.leader.name == "a"
    assert state.cluster is None
    assert await store.delete_placement(PLACEMENT.replica) is True
    assert await store.delete_placement(PLACEMENT.replica) is True
    assert (await store.load()).placements == {}


async def test_a_deleted_deployment_is_remembered_until_it_is_wanted_again(
    client: EtcdClient, keys: Keys, leader: Leadership
) -> None:
    store = store_of(client, keys, leader)
    for _ in range(2):
        assert await store.write_deployment(DEPLOYMENT) is True
        assert (await store.load()).deleted == frozenset()
        assert await store.delete_deployment(DEPLOYMENT.deployment) is True
        state = await store.load()
        assert (state.deployments, state.deleted) == ({}, {DEPLOYMENT.deployment})


async def test_a_zombie_writes_nothing_and_is_told_to_look(client: EtcdClient, keys: Keys, leader: Leadership) -> None:
    # Same name, same process, same key: only the value tells a term from another.
    zombie = leadership("a", 1)
    store = store_of(client, keys, zombie)
    assert await store.write_placement(PLACEMENT) is False
    assert await store.delete_placement(PLACEMENT.replica) is False
    assert await store.write_deployment(DEPLOYMENT) is False
    assert await store.delete_deployment(DEPLOYMENT.deployment) is False
    assert zombie.doubts == 4
    state = await store.load()
    assert state.placements == {}
    assert state.deployments == {}


async def test_no_leader_key_or_no_leadership_writes_nothing(
    client: EtcdClient, keys: Keys, leader: Leadership
) -> None:
    assert await store_of(client, keys, Leadership(None)).write_placement(PLACEMENT) is False
    await client.delete(keys.leader, timeout=T)
    assert await store_of(client, keys, leader).write_placement(PLACEMENT) is False
    assert leader.doubts == 1


async def test_an_epoch_never_goes_down(client: EtcdClient, keys: Keys, leader: Leadership) -> None:
    store = store_of(client, keys, leader)
    assert await store.write_placement(PLACEMENT)
    assert await store.write_placement(replace(PLACEMENT, members=()))
    assert await store.write_placement(replace(PLACEMENT, epoch=Epoch(4)))
    with pytest.raises(FencedError, match="r1: epoch 3 after epoch 4"):
        await store.write_placement(PLACEMENT)
    assert (await store.load()).placements["r1"].epoch == 4


async def test_revoking_a_lease_twice_is_done_once(client: EtcdClient, keys: Keys, leader: Leadership) -> None:
    store = store_of(client, keys, leader)
    lease = await client.lease_grant(60, timeout=T)
    await client.put(keys.node(NODE.node), to_json(NODE), lease=lease.id, timeout=T)
    await store.revoke_lease(lease.id)
    await store.revoke_lease(lease.id)
    assert (await store.load()).nodes == {}


async def test_a_leader_that_does_not_trust_its_lease_revokes_nobody(
    client: EtcdClient, keys: Keys, leader: Leadership
) -> None:
    lease = await client.lease_grant(60, timeout=T)
    leader.trusted = False
    with pytest.raises(EtcdUnavailable, match="nothing is revoked"):
        await store_of(client, keys, leader).revoke_lease(lease.id)
    assert await client.lease_remaining(lease.id, timeout=T) > 0


async def test_etcd_away_is_unavailable_for_every_call(own_etcd: EtcdChild, keys: Keys) -> None:
    await own_etcd.stop()
    async with client_of(own_etcd.endpoint) as client:
        store = store_of(client, keys, leadership("a", 1))
        for call in (
            store.write_placement(PLACEMENT),
            store.delete_placement(PLACEMENT.replica),
            store.write_deployment(DEPLOYMENT),
            store.delete_deployment(DEPLOYMENT.deployment),
            store.revoke_lease(1),
            store.load(),
        ):
            with pytest.raises(EtcdUnavailable):
                await call


class Follower:
    def __init__(self, store: Store) -> None:
        self._store = store
        self.events: list[StoreEvent] = []

    async def run(self) -> None:
        async with aclosing(self._store.follow("a")) as events:
            async for event in events:
                self.events.append(event)

    async def saw(self, *events: StoreEvent) -> None:
        """Wait until all that came is `events`, then forget it."""
        await eventually(f"{events} came", lambda: self.events == list(events))
        self.events.clear()

    def loaded(self) -> list[StoreLoaded]:
        return [event for event in self.events if isinstance(event, StoreLoaded)]


@asynccontextmanager
async def following(store: Store) -> AsyncIterator[Follower]:
    follower = Follower(store)
    async with running(follower.run()):
        await eventually("loaded", follower.loaded)
        yield follower


def empty(**changes: object) -> StoreLoaded:
    return replace(StoreLoaded(nodes={}, deployments={}, placements={}, peers=frozenset()), **changes)  # type: ignore[arg-type]


async def test_changes_become_events(client: EtcdClient, keys: Keys, leader: Leadership) -> None:
    store = store_of(client, keys, leader)
    await client.put(keys.peer("a"), to_json(replace(PEER, name="a")), timeout=T)
    async with following(store) as follower:
        # A process is no peer of its own_etcd.
        await follower.saw(empty())
        await client.put(keys.node(NODE.node), to_json(NODE), timeout=T)
        await follower.saw(NodeKeyChanged(NODE.node, NODE))
        await client.delete(keys.node(NODE.node), timeout=T)
        await follower.saw(NodeKeyChanged(NODE.node, None))
        await store.write_deployment(DEPLOYMENT)
        await follower.saw(DeploymentChanged(DEPLOYMENT.deployment, DEPLOYMENT))
        await store.write_placement(PLACEMENT)
        await follower.saw(PlacementChanged(PLACEMENT.replica, PLACEMENT))
        await store.delete_placement(PLACEMENT.replica)
        await follower.saw(PlacementChanged(PLACEMENT.replica, None))
        await client.put(keys.peer("b"), to_json(PEER), timeout=T)
        await follower.saw(PeersChanged(frozenset({"b"})))
        # The same peer again, and other processes' keys, are no news.
        await client.put(keys.peer("b"), to_json(PEER), timeout=T)
        await client.put(keys.term, b"9", timeout=T)
        await client.delete(keys.peer("b"), timeout=T)
        await follower.saw(PeersChanged(frozenset()))


async def test_a_record_that_cannot_be_read_changes_nothing(client: EtcdClient, keys: Keys, leader: Leadership) -> None:
    store = store_of(client, keys, leader)
    async with following(store) as follower:
        await follower.saw(empty())
        await client.put(keys.node(NODE.node), b"{", timeout=T)
        await client.put(keys.deployment(DEPLOYMENT.deployment), b"[]", timeout=T)
        await client.put(keys.node(NODE.node), to_json(NODE), timeout=T)
        await follower.saw(NodeKeyChanged(NODE.node, NODE))
        assert (await store.load()).deployments == {}


async def test_a_lost_connection_is_followed_by_the_whole(own_etcd: EtcdChild, keys: Keys) -> None:
    async with client_of(own_etcd.endpoint) as client:
        store = store_of(client, keys, leadership("a", 1))
        await client.put(keys.node(NODE.node), to_json(NODE), timeout=T)
        async with following(store) as follower:
            await follower.saw(empty(nodes={NODE.node: NODE}))
            await own_etcd.kill()
            await own_etcd.start()
            await follower.saw(empty(nodes={NODE.node: NODE}))


async def test_a_restored_store_says_so(own_etcd: EtcdChild, keys: Keys, tmp_path: Path) -> None:
    async with client_of(own_etcd.endpoint) as client:
        store = store_of(client, keys, leadership("a", 1))
        save_snapshot(own_etcd, tmp_path / "empty")
        await client.put(keys.node(NODE.node), to_json(NODE), timeout=T)
        async with following(store) as follower:
            await follower.saw(empty(nodes={NODE.node: NODE}))
            await restore_snapshot(own_etcd, tmp_path / "empty")
            await follower.saw(empty(restored=True))
