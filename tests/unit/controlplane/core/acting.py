"""A coordinator under test that has begun, and what it did."""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.core.entities import Replica
from controlplane.core.messages import (
    Effect,
    Recorded,
    SendGateway,
    SendWorker,
)
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import Worker, deployment


def started(workers: int = 1, replicas: int = 1, tensor: int = 1, devices: int = 1) -> Cluster:
    cluster = Cluster()
    cluster.deployments[DeploymentId("m")] = deployment(replicas=replicas, tensor=tensor)
    cluster.load()
    for index in range(workers):
        worker = cluster.add_worker(f"w{index + 1}", devices)
        cluster.register(worker)
        cluster.attach(worker)
    return cluster


def worker_of(cluster: Cluster, name: str = "w1") -> Worker:
    return cluster.workers[NodeId(name)]


def replica_of(cluster: Cluster, name: str = "m-0") -> Replica:
    return cluster.state.replicas[ReplicaId(name)]


def sent(effects: Iterable[Effect], kind: type) -> list[object]:
    bodies = [effect.body for effect in effects if isinstance(effect, SendWorker | SendGateway)]
    return [body for body in bodies if isinstance(body, kind)]


def recorded(effects: Iterable[Effect]) -> list[str]:
    return [effect.name for effect in effects if isinstance(effect, Recorded)]


def ticks(cluster: Cluster, seconds: float) -> list[Effect]:
    count = round(seconds / cluster.timings.heartbeat_interval)
    return [effect for _ in range(count) for effect in cluster.tick()]
