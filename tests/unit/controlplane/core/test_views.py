"""Views carry all that Admin answers, and become its messages without loss."""

from __future__ import annotations

from controlplane.core.entities import LeaderPhase, NodePhase
from controlplane.core.messages import AdminAsked, AskId, LeaseHeard, LeaseMuted, Recorded, ScaleAsked, WriteDone
from controlplane.core.views import RequestStatus, StatusView, requests_view, status_view
from controlplane.runtime.codec import codec_of
from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import RouteBatch
from protos.perdure.v1 import admin_pb2
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import deployment, entry


def serving() -> Cluster:
    cluster = Cluster()
    cluster.deployments[DeploymentId("m")] = deployment(replicas=2)
    cluster.load()
    worker = cluster.add_worker("w1")
    cluster.register(worker)
    cluster.attach(worker)
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"), entry("r2", waited_ms=5000))))
    return cluster


def test_status() -> None:
    cluster = serving()
    cluster.state.fence("Heartbeat")
    view = status_view(cluster.state, cluster.now)
    assert (view.leader.id, view.leader.term, view.leader.phase) == ("cp1", 1, LeaderPhase.REBUILDING)
    assert [(node.id, node.phase) for node in view.nodes] == [("w1", NodePhase.LIVE)]
    assert [(one.id, one.phase) for one in view.replicas] == [("m-0", ReplicaPhase.READY), ("m-1", ReplicaPhase.HELD)]
    assert [(one.id, one.url) for one in view.gateways] == [("g1", "http://g1")]
    (shown,) = view.deployments
    assert (shown.replicas, shown.ready, shown.reason) == (2, 1, "m-1: m-1 needs 1 device, 0 free")
    assert [(one.frame, one.count) for one in view.fenced] == [("Heartbeat", 1)]


def test_what_a_frozen_leader_cannot_do_is_told_with_its_reason() -> None:
    cluster = serving()
    assert status_view(cluster.state, cluster.now).limited is None
    cluster.step(LeaseMuted("etcd at e:2379: permission denied"))
    limited = status_view(cluster.state, cluster.now).limited
    assert limited is not None
    assert limited.text.endswith("no operator's change is taken (etcd at e:2379: permission denied)")
    cluster.step(LeaseHeard())
    assert status_view(cluster.state, cluster.now).limited is None


def test_an_etcd_that_takes_no_writes_is_told_of_until_it_takes_one() -> None:
    cluster = serving()
    refused = Reason(kind=ReasonKind.STORE_UNAVAILABLE, text="mvcc: database space exceeded")

    def written(reason: Reason | None) -> list[str]:
        cluster.step(AdminAsked(AskId(1), ScaleAsked(DeploymentId("m"), 2)))
        effects = cluster.step(WriteDone(cluster.writes.popleft().write, reason is None, reason))
        return [effect.name for effect in effects if isinstance(effect, Recorded) and effect.name.startswith("store")]

    assert written(refused) == ["store_refused"]
    assert written(refused) == []
    limited = status_view(cluster.state, cluster.now).limited
    assert limited is not None
    assert limited.text.endswith("no operator's change is taken (mvcc: database space exceeded)")
    assert written(None) == ["store_writable"]
    assert status_view(cluster.state, cluster.now).limited is None


def test_ranks_are_shown_as_they_come_up() -> None:
    cluster = serving()
    worker = next(iter(cluster.workers.values()))
    cluster.rank_exits(worker, "cpu:0")
    (rank,) = status_view(cluster.state, cluster.now).nodes[0].ranks
    assert (rank.device, rank.phase.name) == ("cpu:0", "EXITED")
    cluster.rank_comes_up(worker)
    (rank,) = status_view(cluster.state, cluster.now).nodes[0].ranks
    assert (rank.device, rank.phase.name, rank.pid) == ("cpu:0", "IDLE", 201)


def test_requests_oldest_first() -> None:
    cluster = serving()
    rows = requests_view(cluster.state, cluster.now + 1.0)
    assert [(row.id, row.phase, row.replica, row.age_ms) for row in rows] == [
        ("r2", "assigned", "m-0", 6000),
        ("r1", "assigned", "m-0", 1000),
    ]


def test_views_become_messages_and_come_back() -> None:
    cluster = serving()
    status = codec_of(StatusView, admin_pb2.StatusResponse.DESCRIPTOR)
    view = status_view(cluster.state, cluster.now)
    assert status.from_proto(status.to_proto(view)) == view
    request = codec_of(RequestStatus, admin_pb2.RequestStatus.DESCRIPTOR)
    for row in requests_view(cluster.state, cluster.now):
        assert request.from_proto(request.to_proto(row)) == row
