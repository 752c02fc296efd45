"""How replicas and nodes go in order: drains, deadlines, undrains."""

from __future__ import annotations

from controlplane.core.entities import NodePhase
from controlplane.core.messages import (
    AdminAnswered,
    AdminAsked,
    AskId,
    DrainAsked,
    UndrainAsked,
)
from controlplane.runtime.ids import NodeId, RequestId
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import MoveRequests, RouteBatch, RouteCause
from controlplane.runtime.messages.session import (
    Leaving,
)
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import entry
from tests.unit.controlplane.core.acting import recorded, replica_of, sent, started, ticks, worker_of


def ask(cluster: Cluster, body: DrainAsked | UndrainAsked) -> AdminAnswered:
    effects = cluster.step(AdminAsked(AskId(1), body))
    (answer,) = [effect for effect in effects if isinstance(effect, AdminAnswered)]
    return answer


def test_drain_moves_what_is_left_at_its_deadline() -> None:
    cluster = started()
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"),)))
    assert ask(cluster, DrainAsked(NodeId("w1"), 2000)).error is None
    assert not sent(ticks(cluster, 1.5), MoveRequests)
    assert len(sent(cluster.tick(), MoveRequests)) == 1
    assert "replica_closed" in recorded(ticks(cluster, cluster.timings.stage))
    assert cluster.state.nodes[NodeId("w1")].phase is NodePhase.LEFT


def test_drain_moves_one_after_another_where_there_is_room() -> None:
    cluster = started(workers=2, replicas=2)
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    names = [RequestId(f"r{index}") for index in range(8)]
    for name in names:
        cluster.tell(gateway, RouteBatch(entries=(entry(name),)))
    running = [name for name in names if name in replica_of(cluster).load.outstanding]
    assert len(running) == 4
    ask(cluster, DrainAsked(NodeId("w1"), 8000))
    moved: list[RequestId] = []
    for passed in range(1, 16):
        for move in sent(cluster.tick(), MoveRequests):
            assert isinstance(move, MoveRequests)
            moved += move.requests
            entries = tuple(entry(name, attempt=2, cause=RouteCause.PLANNED) for name in move.requests)
            cluster.tell(gateway, RouteBatch(entries=entries))
        assert len(moved) == passed // 4
    assert moved == running[:0:-1]


def test_drain_keeps_what_no_other_replica_would_take() -> None:
    cluster = started(workers=1)
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"), entry("r2"))))
    ask(cluster, DrainAsked(NodeId("w1"), 8000))
    assert not sent(ticks(cluster, 7.5), MoveRequests)


def test_undrain_before_the_deadline_goes_on_as_if_nothing_was() -> None:
    cluster = started()
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"),)))
    ask(cluster, DrainAsked(NodeId("w1"), 0))
    assert replica_of(cluster).phase is ReplicaPhase.DRAINING
    assert ask(cluster, UndrainAsked(NodeId("w1"))).error is None
    assert replica_of(cluster).phase is ReplicaPhase.READY
    assert replica_of(cluster).epoch == 1


def test_a_leaving_node_moves_its_streams_before_its_own_deadline() -> None:
    cluster = started()
    cluster.settle()
    gateway = cluster.add_gateway("g1")
    cluster.tell(gateway, RouteBatch(entries=(entry("r1"),)))
    reason = Reason(kind=ReasonKind.DRAINING, text="SIGTERM")
    cluster.say(worker_of(cluster), Leaving(deadline_ms=10_000, reason=reason))
    assert sent(ticks(cluster, 10.0 - cluster.timings.stage), MoveRequests)
    answer = ask(cluster, UndrainAsked(NodeId("w1")))
    assert answer.error is not None
    assert answer.error.kind is ReasonKind.DRAINING


def test_nobody_can_drain_what_is_not_there() -> None:
    cluster = started()
    answer = ask(cluster, DrainAsked(NodeId("w9"), 0))
    assert answer.error is not None
    assert answer.error.kind is ReasonKind.UNKNOWN_ID


def test_a_draining_node_takes_no_new_replica() -> None:
    cluster = started(workers=1, devices=2)
    cluster.settle()
    ask(cluster, DrainAsked(NodeId("w1"), 0))
    cluster.settle()
    assert replica_of(cluster).phase is ReplicaPhase.HELD
