"""Which nodes there are and what is believed of them.

Death of a node = its lease is gone *and* its session is not live. Either may cause the other: a broken session with
proof of death revokes the lease; a lease gone under a live session means register again. Silence under a renewed
lease is UNREACHABLE: no new work, never a kill.
"""

from __future__ import annotations

from controlplane.core import flapping
from controlplane.core.entities import LeaderPhase, Link, Node, NodePhase, SnapshotChunks, is_session_live
from controlplane.core.messages import ConnectionId, Probe, ProbeDone, RevokeDone, RevokeLease, StepDown
from controlplane.core.recovery import close_on, fail, pardon_all
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import NodeId, Term
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.session import Relet, WorkerHello, WorkerWelcome
from controlplane.runtime.records import NodeRecord
from controlplane.runtime.timing import ETCD_EXPIRY_LAG_S

GONE = frozenset({NodePhase.LOST, NodePhase.LEFT})

# ---------------------------------------------------------------- sessions


def holder_of(state: ClusterState, hello: WorkerHello) -> Reason | None:
    """Why the node's name is not the newcomer's: another incarnation holds it, alive and well."""
    node = state.nodes.get(hello.node)
    if node is None or node.incarnation == hello.incarnation or not is_session_live(node):
        return None
    text = f"node {node.node} is pid {node.pid} on {node.host} at {node.serve_address} already"
    return Reason(kind=ReasonKind.SUPERSEDED, text=text, node=node.node)


def welcome(state: ClusterState, connection: ConnectionId, hello: WorkerHello) -> None:
    """Take the worker's session; it counts once its Snapshot is complete."""
    node = state.nodes.get(hello.node)
    if node is not None and node.incarnation != hello.incarnation:
        text = f"another incarnation came: pid {hello.pid} on {hello.host}"
        lose(state, node, Reason(kind=ReasonKind.SUPERSEDED, text=text, node=node.node))
        node = None
    if node is None:
        node = state.nodes[hello.node] = _newcomer(hello)
    _take_hello(state, node, hello)
    if node.link is not None:
        reason = Reason(kind=ReasonKind.SUPERSEDED, text="a newer session of the same process", node=node.node)
        state.close_link(node.link, reason)
        if node.phase in (NodePhase.LIVE, NodePhase.DRAINING):
            _unreachable(state, node, reason)
    node.link = state.links[connection] = Link(connection, node, state.mint_session())
    node.known = False
    state.untold[node.node] = None
    node.chunks = SnapshotChunks()
    node.silence_s = 0.0
    if node.probing:
        node.probing, node.void_probes = False, node.void_probes + 1
    session, timing = node.link.session, state.timings.to_spec()
    body = WorkerWelcome(term=state.term, session=session, timing=timing, leader=state.incarnation)
    state.send_worker(node, body)


def _newcomer(hello: WorkerHello) -> Node:
    return Node(
        node=hello.node,
        incarnation=hello.incarnation,
        phase=NodePhase.KNOWN,
        serve_address=hello.serve_address,
        host=hello.host,
        pid=hello.pid,
        lease_id=hello.lease_id,
        # it registered before it came; its key's watch event may still be on the way
        leased=True,
    )


def _take_hello(state: ClusterState, node: Node, hello: WorkerHello) -> None:
    if node.revoked:
        state.refusal_lies.add(node.serve_address)
        state.record("node_refusal_disproved", node=node.node, details={"address": node.serve_address})
    node.revoked = node.proven = False
    if node.phase in GONE:
        node.phase, node.drain = NodePhase.KNOWN, None
    node.serve_address, node.host, node.pid = hello.serve_address, hello.host, hello.pid
    node.devices = hello.devices
    state.places.roomy[node.node] = None
    if hello.lease_id:
        node.lease_id = hello.lease_id


def joined(state: ClusterState, node: Node, *, draining: bool) -> None:
    """The node's Snapshot is complete."""
    node.known = node.worked = True
    returned = node.phase is NodePhase.UNREACHABLE
    node.phase = NodePhase.DRAINING if draining or node.drain is not None else NodePhase.LIVE
    node.unreachable_s = 0.0
    node.reason = None
    state.out.workers[node.node] = node
    devices = ",".join(device.id for device in node.devices)
    state.record("node_returned" if returned else "node_joined", node=node.node, details={"devices": devices})
    if not node.leased:
        _relet(state, node)
    _serve_again(state, node)
    if not returned:
        flapping.came(state, node)
    if node.shunned_s <= 0:
        pardon_all(state, fresh=not returned)


def broken(state: ClusterState, node: Node) -> None:
    """The node's stream ended."""
    node.link = None
    node.known = False
    if node.phase is NodePhase.LEFT:
        state.out.workers[node.node] = node
    if node.phase in GONE or node.phase is NodePhase.KNOWN:
        return
    if node.drain is not None and node.drain.leaving and not node.leased:
        left(state, node, node.drain.reason)
        return
    _unreachable(state, node, Reason(kind=ReasonKind.SESSION_SILENT, text="its session broke", node=node.node))
    judge(state, node)
    _probe(state, node)


def heard(state: ClusterState, node: Node) -> None:
    """A frame came: it is not silent."""
    node.silence_s = 0.0
    if node.phase is NodePhase.UNREACHABLE and node.known:
        node.phase = NodePhase.LIVE if node.drain is None else NodePhase.DRAINING
        node.unreachable_s = 0.0
        node.noticed = None
        node.reason = None
        state.record("node_returned", node=node.node)
        _serve_again(state, node)


def _serve_again(state: ClusterState, node: Node) -> None:
    state.replan = True
    for replica in state.places.on(node.node):
        state.reroute.add(replica.deployment)
        state.weigh(replica)


def _unreachable(state: ClusterState, node: Node, reason: Reason) -> None:
    if node.phase is not NodePhase.UNREACHABLE:
        node.phase = NodePhase.UNREACHABLE
        node.unreachable_s = 0.0
        node.noticed = state.now
        node.reason = reason
        state.record("node_unreachable", node=node.node, reason=reason)


# ---------------------------------------------------------------- leases and proof


def key_changed(state: ClusterState, name: NodeId, record: NodeRecord | None) -> None:
    """The node's key in etcd was put, or is gone."""
    node = state.nodes.get(name)
    if record is None:
        # the end of a predecessor's key says nothing of one whose own is yet to be seen
        if node is not None and node.registered:
            key_absent(state, name)
        return
    if node is not None and node.incarnation != record.incarnation:
        if is_session_live(node) and node.leased:
            # an older registration seen late: the session that speaks to us is the newer news
            return
        text = f"another incarnation registered: pid {record.pid} on {record.host}"
        lose(state, node, Reason(kind=ReasonKind.SUPERSEDED, text=text, node=name))
        node = None
    if node is None:
        state.nodes[name] = node = _from_record(record)
    elif node.phase in GONE and node.link is None:
        node.phase, node.drain = NodePhase.KNOWN, None
    if node.untold:
        state.untold[name] = None
    node.leased = node.registered = True
    node.lease_id = record.lease_id


def key_absent(state: ClusterState, name: NodeId) -> None:
    """etcd surely holds no key of the node."""
    node = state.nodes[name]
    if node.leased:
        _lease_gone(state, node)


def _from_record(record: NodeRecord) -> Node:
    return Node(
        node=record.node,
        incarnation=record.incarnation,
        phase=NodePhase.KNOWN,
        serve_address=record.serve_address,
        host=record.host,
        pid=record.pid,
        lease_id=record.lease_id,
        leased=True,
        registered=True,
    )


def _lease_gone(state: ClusterState, node: Node) -> None:
    node.leased = False
    if node.drain is not None and node.drain.leaving:
        left(state, node, node.drain.reason)
    elif _speaks(state, node):
        _relet(state, node)
    else:
        judge(state, node)


def _speaks(state: ClusterState, node: Node) -> bool:
    """Its session is live, or just beginning."""
    return node.link is not None and node.silence_s < state.timings.session_silence


def _relet(state: ClusterState, node: Node) -> None:
    reason = Reason(kind=ReasonKind.LEASE_EXPIRED, text="its lease is gone while its session lives", node=node.node)
    state.send_worker(node, Relet(reason=reason))
    state.record("node_relet", node=node.node, reason=reason)


def judge(state: ClusterState, node: Node) -> None:
    """Dead if its lease is gone and its session is not live, unless absence proves nothing yet."""
    if node.phase in GONE or node.leased or _speaks(state, node):
        return
    if node.proven:
        lose(state, node, _refused(node))
    elif state.phase is LeaderPhase.LEADING:
        lose(state, node, Reason(kind=ReasonKind.LEASE_EXPIRED, text="lease and session are gone", node=node.node))


def judge_all(state: ClusterState) -> None:
    """Grace is over: absence counts from now on."""
    for node in list(state.nodes.values()):
        judge(state, node)
        if node.proven:
            _act_on_proof(state, node)
    for replica in list(state.replicas.values()):
        absent = [name for name in replica.nodes if name not in state.nodes or state.nodes[name].phase in GONE]
        if replica.adopting and absent:
            text = f"{', '.join(absent)} did not come back"
            fail(state, replica, Reason(kind=ReasonKind.LEASE_EXPIRED, text=text, node=absent[0]))


def lose(state: ClusterState, node: Node, reason: Reason) -> None:
    """The node is dead: the one event from which all recovery follows."""
    if node.phase in GONE:
        return
    if node.link is not None:
        state.close_link(node.link, reason)
    flapping.lost(state, node)
    node.phase, node.reason = NodePhase.LOST, reason
    node.known = node.leased = False
    node.drain = None
    node.unreachable_s = 0.0
    node.ranks.clear()
    node.held.clear()
    node.spares.clear()
    node.sequences.clear()
    if reason.kind is ReasonKind.LEASE_EXPIRED:
        # It may be cut off, and come back with the streams that it holds. Gateways hear so before they hear that it
        # is gone.
        state.unheard_s = state.timings.resume_grace
        state.beat_gateways()
    state.out.workers[node.node] = node
    state.record("node_lost", node=node.node, reason=reason)
    close_on(state, node, reason)
    state.replan = True


def left(state: ClusterState, node: Node, reason: Reason) -> None:
    """The node took its leave in order: nothing runs on it any more."""
    if node.phase in GONE:
        return
    node.phase, node.reason = NodePhase.LEFT, reason
    state.out.workers[node.node] = node
    state.record("node_left", node=node.node, reason=reason)
    close_on(state, node, reason)
    state.replan = True


def _probe(state: ClusterState, node: Node) -> None:
    if (
        node.phase is NodePhase.UNREACHABLE
        and node.worked
        and not node.probing
        and not node.proven
        and node.serve_address not in state.refusal_lies
    ):
        node.probing = True
        state.emit(Probe(node.node, node.incarnation, node.serve_address))


def probed(state: ClusterState, done: ProbeDone) -> None:
    node = state.nodes.get(done.node)
    if node is None or node.incarnation != done.incarnation:
        return
    if node.void_probes:
        node.void_probes -= 1
        return
    node.probing = False
    if done.refused and node.link is None and node.phase is NodePhase.UNREACHABLE:
        node.proven = True
        state.record("node_death_proven", node=node.node, reason=_refused(node))
        _act_on_proof(state, node)


def _act_on_proof(state: ClusterState, node: Node) -> None:
    """Revoke exactly the dead process's lease. Frozen, its replicas are closed in memory and the lease waits."""
    if node.phase is not NodePhase.UNREACHABLE or node.link is not None:
        return
    if not node.leased:
        judge(state, node)
    elif state.frozen:
        close_on(state, node, _refused(node))
    elif not node.revoked:
        node.revoked = True
        state.emit(RevokeLease(node.node, node.incarnation, node.lease_id))


def revoked(state: ClusterState, done: RevokeDone) -> None:
    node = state.nodes.get(done.node)
    if node is None or node.incarnation != done.incarnation or not node.revoked:
        return
    if not done.ok:
        node.revoked = False  # the next tick asks again
    elif node.leased:
        _lease_gone(state, node)


def _refused(node: Node) -> Reason:
    text = f"its session broke and {node.serve_address} refuses connections"
    return Reason(kind=ReasonKind.CONNECTION_REFUSED, text=text, node=node.node)


# ---------------------------------------------------------------- time


def tick(state: ClusterState, passed_s: float) -> None:
    """Count silence; give up sessions that stay silent; ask again for proof."""
    for node in list(state.nodes.values()):
        flapping.stayed(state, node, passed_s)
        if node.link is not None:
            _judge_silence(state, node, passed_s)
        if node.phase is NodePhase.UNREACHABLE:
            node.unreachable_s += passed_s
            if node.link is None:
                _probe(state, node)
            if node.proven:
                _act_on_proof(state, node)
        elif node.phase in GONE and node.link is None:
            node.unreachable_s += passed_s
            if node.unreachable_s >= state.timings.regroup_window and not node.leased:
                del state.nodes[node.node]
                continue
        judge(state, node)
    _suspect_self(state)


def forgive_silence(state: ClusterState) -> None:
    """The judge itself was away: nobody's silence counts."""
    for node in state.nodes.values():
        node.silence_s = node.unreachable_s = 0.0


def _judge_silence(state: ClusterState, node: Node, passed_s: float) -> None:
    node.silence_s += passed_s
    text = f"no frame for {node.silence_s:g} s"
    reason = Reason(kind=ReasonKind.SESSION_SILENT, text=text, node=node.node)
    if node.silence_s >= state.timings.session_silence and is_session_live(node):
        _unreachable(state, node, reason)
    if node.silence_s >= state.timings.failure_timeout and node.link is not None:
        state.close_link(node.link, reason)
        broken(state, node)


def _suspect_self(state: ClusterState) -> None:
    """Most sessions are gone while their leases are renewed: the leader is cut off, not they."""
    met = [node for node in state.nodes.values() if node.worked and node.phase not in GONE]
    long = state.timings.lease_ttl + ETCD_EXPIRY_LAG_S
    cut = [
        node
        for node in met
        if node.phase is NodePhase.UNREACHABLE and node.leased and not node.proven and node.unreachable_s > long
    ]
    if len(cut) >= 2 and 2 * len(cut) > len(met) and state.peers and not state.frozen:
        names = ", ".join(sorted(node.node for node in cut))
        reason = Reason(kind=ReasonKind.SESSION_SILENT, text=f"cut off from {names}, whose leases are renewed")
        step_down(state, reason, pause_s=state.timings.resign)


def step_down(state: ClusterState, reason: Reason, pause_s: float = 0.0, highest_term: Term | None = None) -> None:
    """Stop leading: nothing is done after this step."""
    state.over = True
    state.emit(StepDown(reason, pause_s, highest_term or state.term))
