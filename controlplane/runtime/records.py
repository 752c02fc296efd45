"""What stands in etcd, as frozen dataclasses in JSON. Small, slow state only; never anything per request.

Keys, below `/perdure/<cluster name>/`:

    cluster                 ClusterRecord     written once
    term                    integer           highest term of any leader
    leader                  LeaderRecord      under the leader's lease; its *value* is every guard
    controlplanes/<name>    PeerRecord        under that process's lease
    nodes/<node>            NodeRecord        under the worker daemon's lease
    deployments/<id>        DeploymentRecord  desired state
    placements/<replica>    PlacementRecord   actual state; holds epoch e before any Form(e)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from controlplane.runtime.ids import ClusterId, DeploymentId, Epoch, Incarnation, NodeId, ReplicaId, Term
from controlplane.runtime.messages.common import Member, ReplicaSpec, TimingSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRecord:
    """Written by the first control plane; every process checks `cluster` in each hello."""

    cluster: ClusterId
    timing: TimingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderRecord:
    name: str
    incarnation: Incarnation
    term: Term
    # host:port of its gRPC server.
    address: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRecord:
    """A control-plane process, leader or not."""

    name: str
    incarnation: Incarnation
    address: str
    # Base URL of its HTTP gateway; "" where it serves none.
    url: str
    pid: int
    # host.boot_id() of its machine; "": unknown, so that nobody there may judge it dead by its pid.
    boot_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    node: NodeId
    incarnation: Incarnation
    serve_address: str
    host: str
    pid: int
    # host.boot_id() of its machine.
    boot_id: str
    lease_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentRecord:
    """A model, its parallel degrees, how many replicas, its failure policy."""

    deployment: DeploymentId
    # Name under which clients ask for it.
    model: str
    spec: ReplicaSpec
    replicas: int
    # "checkpoint_restart" or "elastic_scaling".
    recovery_strategy: str = "checkpoint_restart"
    max_retries: int = 3
    slow_nodes: str = "report"
    # Free devices that keep shards ready.
    spares: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRecord:
    replica: ReplicaId
    deployment: DeploymentId
    epoch: Epoch
    # Empty: the replica is gone; the record stays so that its epochs never go back.
    members: tuple[Member, ...] = ()
    # Term of the leader that wrote it.
    term: Term
    # What its ranks were told to load.
    spec: ReplicaSpec | None = None


def to_json(record: object) -> bytes:
    """The record as etcd holds it."""
    return msgspec.json.encode(record)


def from_json(data: bytes, cls: type[T]) -> T:
    """The record in `data`. Raises msgspec.ValidationError naming the field."""
    return msgspec.json.decode(data, type=cls)
