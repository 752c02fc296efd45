"""Clusters whose replicas shrink and grow, for tests."""

from __future__ import annotations

from controlplane.core.degrees import named
from controlplane.core.entities import Replica
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId
from controlplane.runtime.messages.common import ReplicaPhase
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import deployment

M = DeploymentId("m")


def cluster_of(*devices: int, replicas: int = 1, tensor: int = 2, pipeline: int = 1, elastic: bool = True) -> Cluster:
    """Workers w1, w2, … with so many devices each, and all that these let come up."""
    cluster = Cluster()
    cluster.deployments[M] = deployment(replicas=replicas, tensor=tensor, pipeline=pipeline, elastic=elastic)
    cluster.load()
    for index, count in enumerate(devices):
        join(cluster, f"w{index + 1}", count)
    cluster.settle()
    seconds(cluster, cluster.timings.leader_grace)
    return cluster


def join(cluster: Cluster, name: str, devices: int) -> None:
    worker = cluster.add_worker(name, devices)
    cluster.register(worker)
    cluster.attach(worker)


def die(cluster: Cluster, name: str) -> None:
    cluster.kill(cluster.workers[NodeId(name)])
    cluster.settle()


def seconds(cluster: Cluster, count: float) -> None:
    """Time passes; everybody answers."""
    for _ in range(round(count / cluster.timings.heartbeat_interval)):
        cluster.tick()
        cluster.settle()


def replica_of(cluster: Cluster, name: str = "m-0") -> Replica:
    return cluster.state.replicas[ReplicaId(name)]


def shape(cluster: Cluster) -> dict[str, str]:
    """Degrees of those that serve; phases of the others."""
    return {
        name: named(replica.spec.degrees)
        if replica.phase is ReplicaPhase.READY and replica.spec
        else replica.phase.name
        for name, replica in cluster.state.replicas.items()
    }
