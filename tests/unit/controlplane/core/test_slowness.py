"""A replica far slower than its equals is told of once, and only if that lasts."""

from __future__ import annotations

from dataclasses import replace

from controlplane.core.entities import Replica
from controlplane.core.messages import AdminAsked, AskId, DrainAsked, Recorded, Tick
from controlplane.runtime.ids import DeploymentId, ReplicaId
from controlplane.runtime.messages.common import ReasonKind
from controlplane.runtime.messages.session import Heartbeat, ReplicaLoad
from tests.scenario.coordinator.model import Cluster
from tests.unit.controlplane.core.test_failures import serving


def beat(cluster: Cluster, step_ms: dict[str, float]) -> list[Recorded]:
    """One interval: each replica's driver tells its step time, with work to do. What was recorded."""
    told: list[Recorded] = []
    cluster.now += cluster.state.timings.heartbeat_interval
    for replica in list(cluster.state.replicas.values()):
        if replica.holds_devices:
            _say(cluster, replica, step_ms.get(replica.replica, 10.0))
    for effect in cluster.step(Tick()):
        if isinstance(effect, Recorded) and effect.reason is not None and effect.reason.kind is ReasonKind.SLOW:
            told.append(effect)
        if isinstance(effect, Recorded) and effect.name == "replica_recovered_pace":
            told.append(effect)
    return told


def _say(cluster: Cluster, replica: Replica, step_ms: float) -> None:
    worker = next(worker for worker in cluster.workers.values() if worker.node == replica.nodes[0])
    before = replica.load.heartbeat
    load = ReplicaLoad(replica=replica.replica, epoch=replica.epoch, free_blocks=900, running=4, waiting=0)
    progress = before.progress + 1 if before is not None else 1
    load = replace(load, step_ms=step_ms, progress=progress)
    cluster.say(worker, Heartbeat(uptime_ms=1, replicas=(load,)))


def intervals(cluster: Cluster) -> int:
    timings = cluster.state.timings
    return round(timings.slow_for / timings.heartbeat_interval)


def test_one_that_stays_slow_is_told_of_once_and_again_when_it_is_over() -> None:
    cluster, _, _ = serving(3)
    told: list[Recorded] = []
    for _ in range(intervals(cluster) + 5):
        told += beat(cluster, {"m-1": 45.0})
    assert [(one.name, one.replica) for one in told] == [("replica_slowed", "m-1")]
    assert told[0].reason is not None
    assert "4.5 times its equals'" in told[0].reason.text
    assert [one.name for one in beat(cluster, {})] == ["replica_recovered_pace"]


def slow_drained(cluster: Cluster) -> list[str]:
    """After a little longer than it takes to tell."""
    for _ in range(intervals(cluster) + 2):
        beat(cluster, {"m-1": 45.0})
    return [node.node for node in cluster.state.nodes.values() if node.drain is not None]


def drain_slow_nodes(cluster: Cluster) -> None:
    deployment = cluster.state.deployments[DeploymentId("m")]
    deployment.record = replace(deployment.record, slow_nodes="drain")


def test_its_node_is_drained_if_its_deployment_says_so() -> None:
    cluster, _, _ = serving(3)
    slow = cluster.state.replicas[ReplicaId("m-1")].nodes[0]
    assert not slow_drained(cluster)
    drain_slow_nodes(cluster)
    assert slow_drained(cluster) == [slow]
    drain = cluster.state.nodes[slow].drain
    assert drain is not None
    assert drain.reason.kind is ReasonKind.DRAINING, "which is no failure"
    assert "4.5 times its equals'" in drain.reason.text


def test_a_slow_node_stays_while_somebody_else_is_missing() -> None:
    cluster, _, _ = serving(4)
    drain_slow_nodes(cluster)
    other = cluster.state.replicas[ReplicaId("m-2")].nodes[0]
    cluster.step(AdminAsked(AskId(1), DrainAsked(other, 0)))
    assert slow_drained(cluster) == [other]


def test_a_moment_a_little_or_a_pair_prove_nothing() -> None:
    cluster, _, _ = serving(3)
    for _ in range(3):
        for _ in range(intervals(cluster) - 2):
            assert not beat(cluster, {"m-1": 45.0})
        assert not beat(cluster, {})
    for _ in range(2 * intervals(cluster)):
        assert not beat(cluster, {"m-1": 25.0})
    two, _, _ = serving(2)
    for _ in range(2 * intervals(two)):
        assert not beat(two, {"m-1": 90.0})
