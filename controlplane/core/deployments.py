"""Desired state against actual state: which replicas there should be, and a place for those that have none.

`reconcile` runs after every step that changed something it looks at. It does nothing that needs etcd while frozen.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from controlplane.core.entities import Deployment, LeaderPhase, Node, NodePhase, Replica
from controlplane.core.groups import note_epoch, place
from controlplane.core.messages import AdminAnswered, ApplyAsked, AskId, ScaleAsked, WriteDeployment, WriteDone
from controlplane.core.placement import FreeDevice, FreeNode, Wanted, plan
from controlplane.core.recovery import bury, pardon, retire, settle_drains, start_drain
from controlplane.core.scheduler import drop_queue
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import DeploymentId, Epoch, NodeId, ReplicaId
from controlplane.runtime.messages.common import RankPhase, Reason, ReasonKind, ReplicaPhase, ReplicaSpec
from controlplane.runtime.messages.route import RouteCode
from controlplane.runtime.records import DeploymentRecord, PlacementRecord

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
NAME_LENGTH_MAX = 63

STRATEGIES = ("checkpoint_restart", "elastic_scaling")


# ---------------------------------------------------------------- what is desired


def apply(state: ClusterState, ask: AskId, asked: ApplyAsked) -> None:
    """An operator's deployment: checked, then written to etcd, then taken."""
    fault = fault_of(state, asked.record)
    if state.frozen:
        fault = Reason(kind=ReasonKind.STORE_UNAVAILABLE, text="the leader cannot reach etcd")
    if fault is not None:
        state.emit(AdminAnswered(ask, fault))
        return
    write = state.mint_write()
    state.applying[write] = (ask, asked.record)
    state.emit(WriteDeployment(write, asked.record))


def scale(state: ClusterState, ask: AskId, asked: ScaleAsked) -> None:
    """An operator's number of replicas, for a deployment as it is otherwise."""
    known = state.deployments.get(asked.deployment)
    if known is None or known.removed:
        state.emit(AdminAnswered(ask, Reason(kind=ReasonKind.UNKNOWN_ID, text=f"no deployment {asked.deployment}")))
        return
    apply(state, ask, ApplyAsked(replace(known.record, replicas=asked.replicas)))


def applied(state: ClusterState, done: WriteDone) -> None:
    ask, record = state.applying.pop(done.write)
    if not done.ok:
        reason = done.reason or Reason(kind=ReasonKind.STORE_UNAVAILABLE, text="the deployment could not be written")
        state.emit(AdminAnswered(ask, reason))
        return
    created = record.deployment not in state.deployments
    change(state, record.deployment, record)
    for replica in state.deployments[record.deployment].replicas.values():
        pardon(state, replica)
    state.emit(AdminAnswered(ask, None, created))


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
        (min(degrees.tensor, degrees.pipeline, degrees.data, degrees.expert) < 1, "spec.degrees: must be at least 1"),
        (
            record.recovery_strategy not in STRATEGIES,
            f"recovery_strategy: {record.recovery_strategy!r} is none of {', '.join(STRATEGIES)}",
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
        known.record, known.removed = record, False
        known.settled = False
        for replica in known.replicas.values():
            state.row_changed(replica)
        state.record("deployment_changed", details={"deployment": name, "replicas": str(record.replicas)})


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


# ---------------------------------------------------------------- towards it


def reconcile(state: ClusterState) -> None:
    """Bring actual state towards desired state, as far as the leader may now."""
    settle_drains(state)
    if state.frozen:
        return
    for deployment in list(state.deployments.values()):
        if not deployment.settled:
            _settle(state, deployment)
    if may_place(state):
        _place_homeless(state)


def _settle(state: ClusterState, deployment: Deployment) -> None:
    """Make the deployment's replicas those that are wanted. To be done again when it or one of them changes."""
    deployment.settled = True
    _add_missing(state, deployment)
    _retire_surplus(state, deployment)
    leaving = any(
        replica.retiring or replica.phase is ReplicaPhase.DRAINING for replica in deployment.replicas.values()
    )
    if _roll(state, deployment) or leaving or len(deployment.replicas) > deployment.record.replicas:
        deployment.settled = False
    if deployment.removed and not deployment.replicas:
        del state.deployments[deployment.record.deployment]


def may_place(state: ClusterState) -> bool:
    """Devices are known well enough: after grace, or once every node in etcd has told what it holds."""
    if state.phase is LeaderPhase.REBUILDING:
        return not any(
            node.phase is NodePhase.KNOWN or (node.link is not None and not node.known) for node in state.nodes.values()
        )
    return state.phase is LeaderPhase.LEADING


def _target(state: ClusterState, deployment: Deployment) -> int:
    """Replicas that there are to be now: as many as desired, and one more while one of them leaves in order or is to be
    replaced, if that has a place; it goes once all the others serve. So that a planned change takes nobody's last
    replica before another serves."""
    wanted = 0 if deployment.removed else deployment.record.replicas
    own = [deployment.replicas.get(index) for index in range(wanted)]
    if all(replica is not None and _is_settled(deployment, replica) for replica in own):
        return wanted
    extra = deployment.replicas.get(wanted)
    if extra is not None and not extra.retiring:
        return wanted + 1
    placed = [replica for replica in own if replica is not None and replica.holds_devices]
    leaving = any(_leaves(deployment, replica) for replica in placed) and len(placed) == wanted
    return wanted + (leaving and extra is None and may_place(state) and _fits(state, deployment))


def _is_settled(deployment: Deployment, replica: Replica) -> bool:
    return replica.phase is ReplicaPhase.READY and replica.spec == deployment.record.spec


def _leaves(deployment: Deployment, replica: Replica) -> bool:
    outdated = replica.phase is ReplicaPhase.READY and replica.spec != deployment.record.spec
    return outdated or (replica.phase is ReplicaPhase.DRAINING and not replica.retiring)


def _fits(state: ClusterState, deployment: Deployment) -> bool:
    """One more replica would have a place."""
    name, degrees = deployment.record.deployment, deployment.record.spec.degrees
    more = Wanted(replica=ReplicaId(name), deployment=name, degrees=degrees)
    return bool(plan([more], _free_nodes(state), _siblings(state))[more.replica].members)


def _add_missing(state: ClusterState, deployment: Deployment) -> None:
    wanted = _target(state, deployment)
    for index in range(wanted):
        if index not in deployment.replicas:
            name = ReplicaId(f"{deployment.record.deployment}-{index}")
            replica = Replica(
                replica=name,
                deployment=deployment.record.deployment,
                index=index,
                phase=ReplicaPhase.HELD,
                epoch=Epoch(0),
                stored=Epoch(0),
            )
            deployment.replicas[index] = state.replicas[name] = replica
            state.row_changed(replica)


def _retire_surplus(state: ClusterState, deployment: Deployment) -> None:
    wanted = _target(state, deployment)
    for index in sorted(deployment.replicas, reverse=True):
        replica = deployment.replicas[index]
        if index >= wanted or deployment.removed:
            desired = 0 if deployment.removed else deployment.record.replicas
            text = f"{deployment.record.deployment} is to have {desired} replicas"
            retire(state, replica, Reason(kind=ReasonKind.ADMIN, text=text))
        if replica.retiring and not replica.holds_devices:
            bury(state, deployment, replica)


def _roll(state: ClusterState, deployment: Deployment) -> bool:
    """Replace replicas of an older spec, one at a time, and only while all others serve. False: there is none."""
    outdated = [
        replica
        for replica in deployment.replicas.values()
        if replica.holds_devices and not replica.retiring and replica.spec != deployment.record.spec
    ]
    if not outdated:
        return False
    reason = Reason(kind=ReasonKind.REPLACED, text=f"the spec of {deployment.record.deployment} changed")
    idle = [replica for replica in outdated if replica.phase not in (ReplicaPhase.READY, ReplicaPhase.DRAINING)]
    for replica in idle:
        if not replica.adopting:
            start_drain(state, replica, reason, left_s=0.0)
    steady = all(
        replica.phase is ReplicaPhase.READY or _is_hopeless_extra(state, deployment, replica)
        for replica in deployment.replicas.values()
    )
    if steady:
        start_drain(state, min(outdated, key=lambda replica: replica.index), reason, left_s=0.0)
    return True


def _is_hopeless_extra(state: ClusterState, deployment: Deployment, replica: Replica) -> bool:
    """Nobody need wait for it: it is one more than desired, and there is no place for it."""
    extra = replica.index >= deployment.record.replicas
    return extra and replica.phase is ReplicaPhase.HELD and not _fits(state, deployment)


def _place_homeless(state: ClusterState) -> None:
    homeless = {
        replica.replica: replica
        for deployment in state.deployments.values()
        for replica in sorted(filter(_wants_place, deployment.replicas.values()), key=lambda replica: replica.index)
    }
    if not homeless:
        return
    wanted = [
        Wanted(
            replica=replica.replica,
            deployment=replica.deployment,
            degrees=_spec(state, replica).degrees,
            previous=replica.members,
        )
        for replica in homeless.values()
    ]
    for name, made in plan(wanted, _free_nodes(state), _siblings(state)).items():
        replica = homeless[name]
        if made.members:
            place(state, replica, _spec(state, replica), made.members, made.reason)
        else:
            _hold(state, replica, made.reason)


def _wants_place(replica: Replica) -> bool:
    if replica.retiring or replica.adopting or replica.retry_s > 0:
        return False
    return replica.phase in (ReplicaPhase.CLOSED, ReplicaPhase.HELD)


def _hold(state: ClusterState, replica: Replica, reason: Reason) -> None:
    if replica.phase is ReplicaPhase.HELD and replica.reason == reason:
        return
    replica.phase, replica.reason = ReplicaPhase.HELD, reason
    state.record("replica_held", replica=replica, reason=reason)
    state.row_changed(replica)


def _spec(state: ClusterState, replica: Replica) -> ReplicaSpec:
    return state.deployments[replica.deployment].record.spec


def _free_nodes(state: ClusterState) -> list[FreeNode]:
    taken: dict[NodeId, set[str]] = defaultdict(set)
    for replica in state.replicas.values():
        if replica.holds_devices:
            for member in replica.members:
                taken[member.node].add(member.device)
    return [_free_node(state, node, taken[node.node]) for node in state.nodes.values() if node.placeable]


def _free_node(state: ClusterState, node: Node, taken: set[str]) -> FreeNode:
    if len(taken) >= len(node.devices):
        return FreeNode(node=node.node, host=node.host, free=())
    devices = [
        FreeDevice(device=device.id, held=_held(state, node, device.id))
        for device in node.devices
        if device.id not in taken and device.id not in node.sick and _is_up(node, device.id)
    ]
    return FreeNode(node=node.node, host=node.host, free=tuple(devices))


def _is_up(node: Node, device: str) -> bool:
    """No rank process on it is still starting, or being started again: its daemon will say when one is there."""
    rank = node.ranks.get(device)
    return rank is None or rank.phase not in (RankPhase.STARTING, RankPhase.EXITED)


def _held(state: ClusterState, node: Node, device: str) -> tuple[DeploymentId, int] | None:
    """Whose weights the device's rank holds, if they are what its deployment asks for now."""
    if device not in node.held:
        return None
    spec, rank = node.held[device]
    deployment = state.deployments.get(spec.deployment)
    return (spec.deployment, rank) if deployment is not None and deployment.record.spec == spec else None


def _siblings(state: ClusterState) -> Mapping[tuple[DeploymentId, NodeId], int]:
    counts: dict[tuple[DeploymentId, NodeId], int] = {}
    for replica in state.replicas.values():
        if replica.holds_devices:
            for node in replica.nodes:
                counts[replica.deployment, node] = counts.get((replica.deployment, node), 0) + 1
    return counts
