"""A deployment of strategy `elastic_scaling`: what has no place at its full degrees is served with fewer ranks, and
grows back once its full size has had a place for a while.

Whoever can have a full place gets one first (placement.py). What remains is shrunk only after a wait: a process that
restarts at once is worth more than a load of other shards. Nobody shrinks while as many replicas as desired have a
place, since a full one stands in for him then; nor onto devices that make another one whole.
"""

from __future__ import annotations

from dataclasses import replace

from controlplane.core.degrees import is_smaller, named, ranks_of, smaller
from controlplane.core.devices import free_nodes, may_place, with_own
from controlplane.core.entities import Deployment, Replica
from controlplane.core.placement import plan
from controlplane.core.state import ClusterState
from controlplane.core.stock import Wanted
from controlplane.runtime.messages.common import ParallelDegrees, Reason, ReasonKind, ReplicaPhase, ReplicaSpec
from controlplane.runtime.records import DeploymentRecord

ELASTIC = "elastic_scaling"


def is_shrunk(record: DeploymentRecord, replica: Replica) -> bool:
    """The replica runs, or ran last, with less than its deployment asks for, and with nothing else that differs."""
    spec, full = replica.spec, record.spec
    if record.recovery_strategy != ELASTIC or spec is None or not is_smaller(spec.degrees, full.degrees):
        return False
    return same_model(spec, full)


def same_model(spec: ReplicaSpec, other: ReplicaSpec) -> bool:
    """They differ in their degrees at most."""
    return replace(spec, degrees=other.degrees) == other


def may_shrink(state: ClusterState, deployment: Deployment) -> bool:
    """Its homeless replicas may be placed with smaller degrees."""
    record = deployment.record
    if record.recovery_strategy != ELASTIC or _is_one_awaited(state):
        return False
    placed = [other for other in deployment.replicas.values() if other.holds_devices and not other.retiring]
    return len(placed) < record.replicas and not any(_grows_soon(state, deployment, other) for other in placed)


def _grows_soon(state: ClusterState, deployment: Deployment, replica: Replica) -> bool:
    """It is shrunk, and what is free makes it whole: whoever shrank onto that would keep both small for good."""
    return is_shrunk(deployment.record, replica) and _has_room(state, deployment, replica)


def _is_one_awaited(state: ClusterState) -> bool:
    """Within a stage. A replica that served is missed: a rank or daemon that restarts is back by then, and the devices
    of those that live are kept for it so long. A node that comes has its devices free one after the other, as its ranks
    come up, and others may follow it."""
    stage = state.timings.stage
    missed = (one for one in state.places.homeless.values() if one.epoch and not one.holds_devices)
    nodes = (node for name in state.places.roomy if (node := state.nodes.get(name)) is not None and node.placeable)
    return any(one.homeless_s < stage for one in missed) or any(state.now - node.joined_at < stage for node in nodes)


def choices(state: ClusterState, replica: Replica, full: ParallelDegrees) -> tuple[ParallelDegrees, ...]:
    """Smaller degrees for the homeless replica, best first. One that never had a place is missed by nobody: its nodes
    may just be starting."""
    if not replica.epoch and replica.homeless_s < state.timings.node_return:
        return ()
    return smaller(full, above=replica.oom_ranks)


def may_grow(state: ClusterState, deployment: Deployment, replica: Replica) -> bool:
    """Its full size has had a place for long enough, with its own devices, and has one now."""
    return replica.roomy_s >= state.timings.grow_after and may_place(state) and _has_room(state, deployment, replica)


def shrunk_reason(record: DeploymentRecord, replica: Replica) -> Reason:
    """What a shrunk replica's status says."""
    full, degrees = record.spec.degrees, ParallelDegrees() if replica.spec is None else replica.spec.degrees
    text = f"shrunk from {named(full)} to {named(degrees)} until {ranks_of(full)} devices are free"
    return Reason(kind=ReasonKind.NO_CAPACITY, text=text)


def tick(state: ClusterState, passed_s: float) -> None:
    """Count how long each shrunk replica could have been larger."""
    for deployment in state.deployments.values():
        for replica in deployment.replicas.values():
            if replica.phase is ReplicaPhase.READY and is_shrunk(deployment.record, replica):
                roomy = may_place(state) and _has_room(state, deployment, replica)
                replica.roomy_s = replica.roomy_s + passed_s if roomy else 0.0
                if replica.roomy_s >= state.timings.grow_after:
                    deployment.settled = False


def _has_room(state: ClusterState, deployment: Deployment, replica: Replica) -> bool:
    degrees = deployment.record.spec.degrees
    want = Wanted(replica=replica.replica, deployment=replica.deployment, degrees=degrees)
    nodes = with_own(state, free_nodes(state, also=replica.nodes), replica)
    return bool(plan([want], nodes, state.places.siblings)[replica.replica].members)
