"""Desired state: an operator's wishes, checked and written to etcd, and what etcd says of them."""

from __future__ import annotations

import re
from dataclasses import replace

from controlplane.core import slowness, spares, weights
from controlplane.core.elastic import ELASTIC, same_model
from controlplane.core.entities import Deployment, Replica
from controlplane.core.groups import note_epoch
from controlplane.core.messages import (
    AdminAnswered,
    ApplyAsked,
    AskId,
    DeleteAsked,
    DeleteDeployment,
    ScaleAsked,
    WriteDeployment,
    WriteDone,
)
from controlplane.core.recovery import pardon
from controlplane.core.scheduler import drop_queue
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import RouteCode
from controlplane.runtime.records import DeploymentRecord, PlacementRecord

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
NAME_LENGTH_MAX = 63

SLOW_NODES = ("report", slowness.DRAIN)
STRATEGIES = ("checkpoint_restart", ELASTIC)


def apply(state: ClusterState, ask: AskId, asked: ApplyAsked) -> None:
    """An operator's deployment: checked, then written to etcd, then taken."""
    if _refused(state, ask, fault_of(state, asked.record)):
        return
    write = state.mint_write()
    # Not once it is written: what etcd's watch says of it may come before.
    known = state.deployments.get(asked.record.deployment)
    state.applying[write] = (ask, asked.record, known is None or known.removed)
    state.emit(WriteDeployment(write, asked.record))


def scale(state: ClusterState, ask: AskId, asked: ScaleAsked) -> None:
    """An operator's number of replicas, for a deployment as it is otherwise."""
    known = state.deployments.get(asked.deployment)
    if known is None or known.removed:
        state.emit(AdminAnswered(ask, _unknown(asked.deployment)))
        return
    apply(state, ask, ApplyAsked(replace(known.record, replicas=asked.replicas)))


def delete(state: ClusterState, ask: AskId, asked: DeleteAsked) -> None:
    """An operator has no more use for a deployment: deleted from etcd, then removed."""
    known = state.deployments.get(asked.deployment)
    if _refused(state, ask, _unknown(asked.deployment) if known is None or known.removed else None):
        return
    write = state.mint_write()
    state.deleting[write] = (ask, asked.deployment)
    state.emit(DeleteDeployment(write, asked.deployment))


def _refused(state: ClusterState, ask: AskId, fault: Reason | None) -> bool:
    """Tell the operator what stands against writing to etcd, if anything does."""
    if state.frozen:
        fault = Reason(kind=ReasonKind.STORE_UNAVAILABLE, text="the leader cannot reach etcd")
    if fault is not None:
        state.emit(AdminAnswered(ask, fault))
    return fault is not None


def _unknown(name: DeploymentId) -> Reason:
    return Reason(kind=ReasonKind.UNKNOWN_ID, text=f"no deployment {name}")


def applied(state: ClusterState, done: WriteDone) -> None:
    ask, record, created = state.applying.pop(done.write)
    if not done.ok:
        reason = done.reason or Reason(kind=ReasonKind.STORE_UNAVAILABLE, text="the deployment could not be written")
        state.emit(AdminAnswered(ask, reason))
        return
    change(state, record.deployment, record)
    for replica in state.deployments[record.deployment].replicas.values():
        pardon(state, replica)
    state.emit(AdminAnswered(ask, None, created))


def deleted(state: ClusterState, done: WriteDone) -> None:
    ask, name = state.deleting.pop(done.write)
    if not done.ok:
        reason = done.reason or Reason(kind=ReasonKind.STORE_UNAVAILABLE, text="the deployment could not be deleted")
        state.emit(AdminAnswered(ask, reason))
        return
    change(state, name, None)
    state.emit(AdminAnswered(ask, None))


def fault_of(state: ClusterState, record: DeploymentRecord) -> Reason | None:
    """What is wrong with a deployment, naming the field; None if nothing is."""
    degrees = record.spec.degrees
    others = [deployment.record for deployment in state.deployments.values() if not deployment.removed]
    rivals = [other for other in others if other.model == record.model and other.deployment != record.deployment]
    faults = (
        (not _is_name(record.deployment), f"deployment: {record.deployment!r} is no lower-case DNS label"),
        (not record.model, "model: is empty"),
        (not record.spec.model_path, "spec.model_path: is empty"),
        (record.spec.deployment != record.deployment, "spec.deployment: differs from deployment"),
        (record.replicas < 0, "replicas: is negative"),
        (record.max_retries < 0, "max_retries: is negative"),
        (not 0 <= record.spares <= spares.SPARES_MAX, f"spares: {record.spares} is not in 0..{spares.SPARES_MAX}"),
        (min(degrees.tensor, degrees.pipeline, degrees.data, degrees.expert) < 1, "spec.degrees: must be at least 1"),
        (
            record.recovery_strategy not in STRATEGIES,
            f"recovery_strategy: {record.recovery_strategy!r} is none of {', '.join(STRATEGIES)}",
        ),
        (
            record.slow_nodes not in SLOW_NODES,
            f"slow_nodes: {record.slow_nodes!r} is none of {', '.join(SLOW_NODES)}",
        ),
        (bool(rivals), f"model: {record.model!r} is served by another deployment"),
    )
    for wrong, text in faults:
        if wrong:
            return Reason(kind=ReasonKind.INVALID, text=text)
    return None


def _is_name(name: str) -> bool:
    return len(name) <= NAME_LENGTH_MAX and _NAME.fullmatch(name) is not None


def change(state: ClusterState, name: DeploymentId, record: DeploymentRecord | None) -> None:
    """Desired state as etcd has it now; None: the deployment is gone."""
    state.replan = True
    known = state.deployments.get(name)
    if record is None:
        if known is not None and not known.removed:
            _remove(state, known)
    elif known is None:
        state.deployments[name] = Deployment(record)
        state.record("deployment_created", details={"deployment": name, "replicas": str(record.replicas)})
    elif known.record != record or known.removed:
        if not same_model(known.record.spec, record.spec):
            weights.forget(state, name)
        _keep_names(known, record)
        known.record, known.removed = record, False
        known.settled = False
        for replica in known.replicas.values():
            state.row_changed(replica)
        state.record("deployment_changed", details={"deployment": name, "replicas": str(record.replicas)})


def _keep_names(deployment: Deployment, wanted: DeploymentRecord) -> None:
    """What replicas of other models than the wanted one are called until they are replaced."""
    names = deployment.names | {deployment.record.spec.model_path: deployment.record.model}
    run = {replica.spec.model_path for replica in deployment.replicas.values() if replica.spec is not None}
    deployment.names = {path: names[path] for path in run & set(names) - {wanted.spec.model_path}}


def _remove(state: ClusterState, deployment: Deployment) -> None:
    deployment.removed, deployment.settled = True, False
    name = deployment.record.deployment
    reason = Reason(kind=ReasonKind.ADMIN, text=f"deployment {name} was removed")
    drop_queue(state, deployment, RouteCode.UNKNOWN_DEPLOYMENT, reason)
    state.record("deployment_removed", reason=reason, details={"deployment": name})


def restore(state: ClusterState, record: PlacementRecord) -> None:
    """A placement that a former leader wrote: its workers will tell whether it still runs."""
    note_epoch(state, record.replica, record.epoch)
    deployment = state.deployments.get(record.deployment)
    index = _index_of(record)
    if deployment is None or index is None or not record.members:
        return
    replica = Replica(
        replica=record.replica,
        deployment=record.deployment,
        index=index,
        phase=ReplicaPhase.HELD,
        epoch=record.epoch,
        stored=record.epoch,
        members=record.members,
        spec=record.spec or deployment.record.spec,
        adopting=True,
        reason=Reason(kind=ReasonKind.SESSION_SILENT, text="waits for its workers to report"),
    )
    deployment.replicas[index] = replica
    deployment.settled = False
    state.replicas[record.replica] = replica
    state.row_changed(replica)


def _index_of(record: PlacementRecord) -> int | None:
    head, _, tail = record.replica.rpartition("-")
    return int(tail) if head == record.deployment and tail.isdecimal() else None
