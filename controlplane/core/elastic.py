"""A deployment of strategy `elastic_scaling`: what has no place at its full degrees is served with fewer ranks, and
grows back once its full size has had a place for a while.

Whoever can have a full place gets one first (placement.py). What remains is shrunk only after a wait: a process that
restarts at once is worth more than a load of other shards. Nobody shrinks while as many replicas as desired have a
place, since a full one stands in for him then; nor onto devices that make another one whole.

Several shrunk replicas end together when a full one fits onto what they hold and what is free. Nothing but a loss or a
wish takes a full replica away, so each such move is for good: there is one more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from controlplane.core.degrees import is_smaller, named, ranks_of, smaller
from controlplane.core.devices import free_nodes, may_place, with_own
from controlplane.core.entities import Deployment, Replica
from controlplane.core.placement import plan
from controlplane.core.state import ClusterState
from controlplane.core.stock import Wanted
from controlplane.runtime.ids import ReplicaId
from controlplane.runtime.messages.common import (
    Member,
    ParallelDegrees,
    Reason,
    ReasonKind,
    ReplicaPhase,
    ReplicaSpec,
)
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
    # Whoever shrank onto what makes another whole would keep both small.
    shrunk = [other for other in placed if is_shrunk(record, other)]
    return len(placed) < record.replicas and not _parts(state, deployment, shrunk)


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


def serving(deployment: Deployment) -> list[Replica]:
    """Shrunk replicas that serve, by number."""
    ready = [replica for replica in deployment.replicas.values() if replica.phase is ReplicaPhase.READY]
    return sorted((one for one in ready if is_shrunk(deployment.record, one)), key=lambda replica: replica.index)


def outgrown(state: ClusterState, deployment: Deployment) -> list[Replica]:
    """Shrunk replicas to end now, so that one of them gets its full size: that has had a place for long enough, with
    their devices, and has one now."""
    ripe = [replica for replica in serving(deployment) if replica.roomy_s >= state.timings.grow_after]
    return _parts(state, deployment, ripe) if may_place(state) else []


def _parts(state: ClusterState, deployment: Deployment, shrunk: Sequence[Replica]) -> list[Replica]:
    """As few of the shrunk replicas as make a full one with what is free; empty if all of them do not. One alone gives
    the least that does, for nobody is left to shrink onto what it does not need."""
    by_size = sorted(shrunk, key=lambda replica: (len(replica.members), replica.index))
    for replica in by_size:
        if full_place(state, deployment, [replica]):
            return [replica]
    if not by_size or not _are_worth_one(state, deployment, by_size):
        return []
    together = by_size
    for replica in by_size:
        others = [other for other in together if other is not replica]
        if _are_worth_one(state, deployment, others):
            together = others
    return together


def _are_worth_one(state: ClusterState, deployment: Deployment, several: Sequence[Replica]) -> bool:
    """They end for one full replica only if that is better for certain: no node's edge cuts a tensor group, and nobody
    else waits for a place, who might take what the first to end gives back."""
    members, tensor = full_place(state, deployment, several), deployment.record.spec.degrees.tensor
    groups = {member.rank // tensor for member in members}
    parts = {(member.rank // tensor, member.node) for member in members}
    strangers = any(other.deployment != deployment.record.deployment for other in state.places.homeless.values())
    return bool(members) and len(parts) == len(groups) and not strangers


def full_place(state: ClusterState, deployment: Deployment, without: Sequence[Replica] = ()) -> tuple[Member, ...]:
    """Where one more full replica would go, had those given their devices back; empty: nowhere."""
    name, degrees = deployment.record.deployment, deployment.record.spec.degrees
    want = Wanted(replica=ReplicaId(name), deployment=name, degrees=degrees)
    nodes = with_own(state, free_nodes(state, also=[node for replica in without for node in replica.nodes]), without)
    return plan([want], nodes, state.places.siblings)[want.replica].members


def grow_reason(record: DeploymentRecord, together: Sequence[Replica]) -> Reason:
    """Why these end now."""
    full = named(record.spec.degrees)
    names = ", ".join(sorted(replica.replica for replica in together))
    what = f"grows back to {full}" if len(together) == 1 else f"{names} make one of {full} together"
    return Reason(kind=ReasonKind.REPLACED, text=f"{what}: its devices have been there for a while")


def shrunk_reason(record: DeploymentRecord, replica: Replica) -> Reason:
    """What a shrunk replica's status says."""
    full, degrees = record.spec.degrees, ParallelDegrees() if replica.spec is None else replica.spec.degrees
    text = f"shrunk from {named(full)} to {named(degrees)} until {ranks_of(full)} devices are free"
    return Reason(kind=ReasonKind.NO_CAPACITY, text=text)


def tick(state: ClusterState, passed_s: float) -> None:
    """Count how long each shrunk replica could have been larger, or part of a larger one."""
    for deployment in state.deployments.values():
        shrunk = serving(deployment)
        roomy = may_place(state) and bool(_parts(state, deployment, shrunk))
        for replica in shrunk:
            replica.roomy_s = replica.roomy_s + passed_s if roomy else 0.0
            if replica.roomy_s >= state.timings.grow_after:
                deployment.settled = False
