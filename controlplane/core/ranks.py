"""What workers say of their rank processes and devices between two Snapshots."""

from __future__ import annotations

from controlplane.core import spares, weights
from controlplane.core.entities import Node
from controlplane.core.recovery import fail
from controlplane.core.state import ClusterState
from controlplane.runtime.messages.common import RankPhase, Reason, ReasonKind
from controlplane.runtime.messages.session import DeviceHealth, RankInfo, RankState
from controlplane.runtime.messages.weights import WeightsState


def rank_changed(state: ClusterState, node: Node, change: RankState) -> None:
    """A rank's process moved on, failed, or is gone: its replica with it."""
    node.ranks[change.device] = RankInfo(
        device=change.device,
        pid=change.pid,
        phase=change.phase,
        replica=change.replica,
        epoch=change.epoch,
        rank=change.rank,
    )
    state.replan = True
    exited = change.phase is RankPhase.EXITED
    if exited:
        node.held.pop(change.device, None)
        spares.exited(state, node, change.device, change.reason or _gone(node, change))
    replica = state.replicas.get(change.replica)
    if replica is None or not (exited or change.reason is not None):
        return
    reason = change.reason or _gone(node, change)
    name, details = "rank_exited" if exited else "rank_failed", {"device": change.device}
    if replica.epoch == change.epoch and replica.holds_devices and node.node in replica.nodes:
        state.record(name, node=node.node, replica=replica, reason=reason, details=details)
        fail(state, replica, reason, change.suspects)
    elif exited and reason.kind is ReasonKind.NO_PROGRESS:
        # Its epoch was closed before, for a rank that held it up: this one.
        state.record(name, node=node.node, reason=reason, details={**details, "epoch": str(change.epoch)})


def weights_changed(state: ClusterState, node: Node, said: WeightsState) -> None:
    """A device's rank process holds something else, or could not load it."""
    weights.told(state, node, said)
    spares.answered(state, node, said)


def _gone(node: Node, change: RankState) -> Reason:
    return Reason(kind=ReasonKind.PROCESS_EXITED, node=node.node, rank=change.rank)


def health_changed(state: ClusterState, node: Node, health: DeviceHealth) -> None:
    """A sick device takes no ranks; the replica on it is closed."""
    if health.ok:
        if node.sick.pop(health.device, None) is not None:
            state.record("device_recovered", node=node.node, details={"device": health.device})
            state.replan = True
        return
    if health.device in node.sick:
        return
    reason = health.reason or Reason(kind=ReasonKind.DEVICE_SICK, text=health.device, node=node.node)
    node.sick[health.device] = reason
    state.record("device_sickened", node=node.node, reason=reason, details={"device": health.device})
    for replica in state.places.on(node.node):
        on_it = any(member.node == node.node and member.device == health.device for member in replica.members)
        if on_it and replica.holds_devices:
            fail(state, replica, reason)
