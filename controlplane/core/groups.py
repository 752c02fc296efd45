"""How a replica comes up: epoch written, Prepare, Form, Load, READY; each stage once all its nodes are through.

etcd holds an epoch before any rank hears of it, and Form goes out only when every node has prepared.
"""

from __future__ import annotations

from controlplane.core import failures, weights
from controlplane.core.entities import FORMING_PHASES, Node, Replica
from controlplane.core.load import Load
from controlplane.core.messages import WriteDone, WritePlacement
from controlplane.core.recovery import close, fail, stage_s
from controlplane.core.stall import Stall
from controlplane.core.state import EPOCHS_A_TERM, ClusterState
from controlplane.runtime.ids import Epoch, ReplicaId
from controlplane.runtime.messages.common import Member, Reason, ReasonKind, ReplicaPhase, ReplicaSpec
from controlplane.runtime.messages.session import (
    FormGroup,
    GroupPhase,
    GroupState,
    LoadProgress,
    LoadReplica,
    PrepareGroup,
)
from controlplane.runtime.messages.weights import WeightSource
from controlplane.runtime.records import PlacementRecord

NONCE_BITS = 128

_ANSWER = {
    ReplicaPhase.PREPARING: GroupPhase.PREPARED,
    ReplicaPhase.FORMING: GroupPhase.FORMED,
    ReplicaPhase.LOADING: GroupPhase.LOADED,
}
_NEXT = {
    ReplicaPhase.PREPARING: ReplicaPhase.FORMING,
    ReplicaPhase.FORMING: ReplicaPhase.LOADING,
    ReplicaPhase.LOADING: ReplicaPhase.READY,
}


def note_epoch(state: ClusterState, replica: ReplicaId, epoch: Epoch) -> None:
    """Somebody knows of this epoch: the next one is above it."""
    state.epochs[replica] = max(epoch, state.epochs.get(replica, Epoch(0)))


def _next_epoch(state: ClusterState, replica: ReplicaId) -> Epoch:
    """Above every epoch that is known of, and above all that could be of an older term."""
    first = (state.term - 1) * EPOCHS_A_TERM + state.epoch_base
    return Epoch(max(state.epochs.get(replica, 0), first) + 1)


def place(
    state: ClusterState, replica: Replica, spec: ReplicaSpec, members: tuple[Member, ...], reason: Reason
) -> None:
    """Begin the replica's next epoch on `members`: first in etcd."""
    assert not replica.holds_devices
    if not replica.unheard or replica.epoch < state.epochs[replica.replica]:
        replica.epoch = _next_epoch(state, replica.replica)
        note_epoch(state, replica.replica, replica.epoch)
    replica.unheard = False
    replica.phase = ReplicaPhase.PLANNED
    replica.members, replica.spec, replica.reason = members, spec, reason
    replica.nonce = f"{state.rng.getrandbits(NONCE_BITS):032x}"
    replica.rendezvous = replica.load_stage = ""
    replica.load_fraction = replica.served_s = 0.0
    write = state.mint_write()
    state.placing[write] = (replica.replica, replica.epoch)
    state.emit(WritePlacement(write, record_of(state, replica)))
    places = ",".join(f"{member.node}/{member.device}" for member in members)
    state.record("replica_planned", replica=replica, reason=reason, details={"members": places})
    state.row_changed(replica)


def record_of(state: ClusterState, replica: Replica) -> PlacementRecord:
    """What etcd is to hold of the replica."""
    return PlacementRecord(
        replica=replica.replica,
        deployment=replica.deployment,
        epoch=replica.epoch,
        members=replica.members,
        term=state.term,
        spec=replica.spec,
    )


def written(state: ClusterState, done: WriteDone) -> None:
    """The epoch stands in etcd, or does not."""
    name, epoch = state.placing.pop(done.write)
    replica = state.replicas.get(name)
    if replica is None or replica.phase is not ReplicaPhase.PLANNED or replica.epoch != epoch:
        return
    if not done.ok:
        reason = done.reason or Reason(kind=ReasonKind.STORE_UNAVAILABLE, text="its epoch could not be written")
        close(state, replica, reason)
        replica.retry_s = state.timings.heartbeat_interval
        # Should the write have happened after all, the next one replaces it, wherever it leads.
        replica.unheard = reason.kind is not ReasonKind.STALE_EPOCH
        return
    replica.stored = replica.epoch
    failures.fenced(state, replica)
    _enter(state, replica, ReplicaPhase.PREPARING)


def answered(state: ClusterState, node: Node, answer: GroupState) -> None:
    """A node is through with a stage, or failed in it."""
    note_epoch(state, answer.replica, answer.epoch)
    replica = state.replicas.get(answer.replica)
    if replica is None or replica.epoch != answer.epoch or node.node not in replica.nodes:
        if answer.phase in _ANSWER.values():
            state.fence("GroupState")
        return
    if not answer.ok:
        if replica.holds_devices and replica.phase is not ReplicaPhase.PLANNED:
            fail(state, replica, answer.reason or Reason(kind=ReasonKind.GROUP_FAILED, node=node.node))
        return
    if _ANSWER.get(replica.phase) is not answer.phase:
        return
    replica.acked.add(node.node)
    if node.node == replica.members[0].node:
        replica.rendezvous = answer.rendezvous or replica.rendezvous
        replica.capacity = answer.capacity or replica.capacity
    if replica.acked >= set(replica.nodes):
        _stage_done(state, replica)


def load_moved(state: ClusterState, node: Node, progress: LoadProgress) -> None:
    replica = state.replicas.get(progress.replica)
    if replica is None or replica.epoch != progress.epoch or node.node not in replica.nodes:
        state.fence("LoadProgress")
        return
    if replica.phase is ReplicaPhase.LOADING:
        if (replica.load_stage, replica.load_fraction) != (progress.stage, progress.fraction):
            replica.stage_s = 0.0
        replica.load_stage, replica.load_fraction = progress.stage, progress.fraction


def resend(state: ClusterState, replica: Replica, node: Node) -> None:
    """Say the current stage's command again, to a node whose session broke: it may not have heard."""
    if replica.phase in FORMING_PHASES and node.node not in replica.acked:
        _command(state, replica, node)


def serve(state: ClusterState, replica: Replica) -> None:
    """The replica takes requests from now on."""
    replica.phase = ReplicaPhase.READY
    replica.adopting = False
    replica.reason = None
    replica.load_fraction = 1.0
    replica.served_s = 0.0
    state.record("replica_ready", replica=replica)
    failures.regrouped(state, replica)
    state.row_changed(replica)
    state.reroute.add(replica.deployment)
    state.replan = True


def _stage_done(state: ClusterState, replica: Replica) -> None:
    following = _NEXT[replica.phase]
    if replica.phase is ReplicaPhase.PREPARING and not replica.rendezvous and len(replica.members) > 1:
        text = f"{replica.nodes[0]} prepared without a rendezvous address"
        fail(state, replica, Reason(kind=ReasonKind.GROUP_FAILED, text=text, node=replica.nodes[0]))
    elif following is not ReplicaPhase.READY:
        _enter(state, replica, following)
    elif replica.capacity is None:
        text = f"{replica.nodes[0]} loaded without telling its capacity"
        fail(state, replica, Reason(kind=ReasonKind.LOAD_FAILED, text=text, node=replica.nodes[0]))
    else:
        replica.load, replica.stall = Load(), Stall()
        serve(state, replica)


def _enter(state: ClusterState, replica: Replica, phase: ReplicaPhase) -> None:
    replica.phase = phase
    replica.acked.clear()
    replica.stage_s = 0.0
    state.row_changed(replica)
    for name in replica.nodes:
        node = state.nodes.get(name)
        if node is not None:
            _command(state, replica, node)


def _command(state: ClusterState, replica: Replica, node: Node) -> None:
    stage_ms = round(stage_s(state, replica) * 1000)
    match replica.phase:
        case ReplicaPhase.PREPARING:
            assert replica.stored == replica.epoch, "Prepare before its epoch stands in etcd"
            assert replica.spec is not None
            body = PrepareGroup(
                replica=replica.replica,
                epoch=replica.epoch,
                members=replica.members,
                nonce=replica.nonce,
                spec=replica.spec,
                deadline_ms=stage_ms,
            )
        case ReplicaPhase.FORMING:
            body = FormGroup(
                replica=replica.replica, epoch=replica.epoch, rendezvous=replica.rendezvous, deadline_ms=stage_ms
            )
        case ReplicaPhase.LOADING:
            # judged here, by its progress: how long a whole load takes is nobody's business
            body = LoadReplica(
                replica=replica.replica, epoch=replica.epoch, deadline_ms=0, sources=_sources(state, replica, node)
            )
        case _:
            raise AssertionError(f"{replica.replica} has no command while {replica.phase.name}")
    state.send_worker(node, body)


def _sources(state: ClusterState, replica: Replica, node: Node) -> tuple[WeightSource, ...]:
    """From whom the replica's ranks on the node may copy weights: anybody but themselves."""
    own = frozenset((member.node, member.device) for member in replica.members if member.node == node.node)
    return weights.sources(state, replica.deployment, besides=own)
