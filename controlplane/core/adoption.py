"""A worker's Snapshot against what the leader believes: how a new leader rebuilds, and how an old one notices.

A session begins with all that the worker holds; nothing carries over from an older session. A replica that all its
workers report READY at its current epoch serves on without any regroup; anything of another epoch is ended.
"""

from __future__ import annotations

from controlplane.core import spares, weights
from controlplane.core.drains import drain
from controlplane.core.entities import FORMING_PHASES, SERVING_PHASES, Drain, Node, Replica, SnapshotChunks
from controlplane.core.groups import note_epoch, resend, serve
from controlplane.core.membership import joined
from controlplane.core.recovery import close, fail
from controlplane.core.state import ClusterState
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.session import AbortGroup, ReleaseReplica, ReplicaInfo, WorkerSnapshot


def snapshot(state: ClusterState, node: Node, chunk: WorkerSnapshot) -> None:
    """Take a chunk; with the last one the session counts."""
    if node.known:
        state.fence("WorkerSnapshot")
        return
    chunks = node.chunks
    chunks.ranks.extend(chunk.ranks)
    chunks.replicas.extend(chunk.replicas)
    chunks.sequences.extend(chunk.sequences)
    if not chunk.last:
        return
    node.chunks = SnapshotChunks()
    node.ranks = {rank.device: rank for rank in chunks.ranks}
    node.held = {rank.device: rank.held for rank in chunks.ranks if rank.held is not None}
    weights.note(state, node)
    spares.begin_session(node)
    node.sequences = {sequence.request: sequence for sequence in chunks.sequences}
    joined(state, node, draining=chunk.draining)
    _compare(state, node, chunks.replicas)
    # What its absence cost is on record; a later failure has a time of its own.
    node.noticed = None
    if chunk.draining and node.drain is None:
        reason = Reason(kind=ReasonKind.DRAINING, text="it was draining when its session began", node=node.node)
        drain(state, node, Drain(reason, state.timings.drain))


def _compare(state: ClusterState, node: Node, reported: list[ReplicaInfo]) -> None:
    current: dict[str, ReplicaInfo] = {}
    for info in reported:
        note_epoch(state, info.replica, info.epoch)
        replica = state.replicas.get(info.replica)
        if replica is not None and _is_current(replica, node, info):
            current[info.replica] = info
        else:
            _end_stale(state, node, info, replica)
    for replica in state.places.on(node.node):
        if replica.holds_devices:
            _compare_one(state, node, replica, current.get(replica.replica))


def _is_current(replica: Replica, node: Node, info: ReplicaInfo) -> bool:
    return replica.holds_devices and replica.epoch == info.epoch and node.node in replica.nodes


def _end_stale(state: ClusterState, node: Node, info: ReplicaInfo, replica: Replica | None) -> None:
    """Of another epoch, or of nothing we know. Weights of a replica that is still wanted are kept. A closed one is
    reported for its epoch alone."""
    if info.phase is ReplicaPhase.CLOSED:
        return
    text = f"epoch {info.epoch} of {info.replica} is over"
    reason = Reason(kind=ReasonKind.STALE_EPOCH, text=text, node=node.node)
    end = AbortGroup if replica is not None and not replica.retiring else ReleaseReplica
    state.send_worker(node, end(replica=info.replica, epoch=info.epoch, reason=reason))
    state.record("replica_fenced", node=node.node, replica=replica, reason=reason)


def _compare_one(state: ClusterState, node: Node, replica: Replica, info: ReplicaInfo | None) -> None:
    serving = info is not None and info.phase in SERVING_PHASES
    if replica.adopting:
        _adopt(state, node, replica, info if serving else None)
    elif replica.phase in SERVING_PHASES and not serving:
        fail(state, replica, _missing(node, replica))
    elif replica.phase in FORMING_PHASES:
        if node.node in replica.acked and info is None:
            fail(state, replica, _missing(node, replica))
        else:
            resend(state, replica, node)


def _adopt(state: ClusterState, node: Node, replica: Replica, info: ReplicaInfo | None) -> None:
    if info is None:
        close(state, replica, _missing(node, replica))
        return
    replica.acked.add(node.node)
    replica.capacity = info.capacity or replica.capacity
    if replica.acked >= set(replica.nodes) and replica.capacity is not None:
        serve(state, replica)


def _missing(node: Node, replica: Replica) -> Reason:
    text = f"{node.node} does not hold epoch {replica.epoch} of {replica.replica}"
    return Reason(kind=ReasonKind.PROCESS_EXITED, text=text, node=node.node)
