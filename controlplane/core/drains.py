"""Planned leave of a node: no new work, running streams end or move, then LEFT. Never counted as a failure."""

from __future__ import annotations

from controlplane.core.entities import Drain, Node, NodePhase, Replica
from controlplane.core.membership import left
from controlplane.core.messages import AdminAnswered, AskId, DrainAsked, UndrainAsked
from controlplane.core.recovery import close, pardon_all, start_drain, stop_drain
from controlplane.core.state import ClusterState
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.session import DrainNode, Leaving, UndrainNode


def drain_asked(state: ClusterState, ask: AskId, asked: DrainAsked) -> None:
    """An operator's drain."""
    node = state.nodes.get(asked.node)
    if node is None or node.phase is NodePhase.LOST:
        state.emit(AdminAnswered(ask, Reason(kind=ReasonKind.UNKNOWN_ID, text=f"no node {asked.node}")))
        return
    left_s = asked.deadline_ms / 1000 or state.timings.drain
    reason = Reason(kind=ReasonKind.DRAINING, text="an operator drains the node", node=node.node)
    if node.drain is None:
        send_away(state, node, Drain(reason, left_s), leave=asked.exit)
    state.emit(AdminAnswered(ask, None))


def send_away(state: ClusterState, node: Node, begun: Drain, *, leave: bool = False) -> None:
    """Drain a node that did not ask for it. `leave`: its daemon exits afterwards."""
    state.send_worker(node, DrainNode(deadline_ms=round(begun.left_s * 1000), reason=begun.reason, exit=leave))
    drain(state, node, begun)


def leaving(state: ClusterState, node: Node, said: Leaving) -> None:
    """The daemon was asked to stop. Its streams move one stage before its deadline, so that they still can."""
    deadline_s = said.deadline_ms / 1000
    left_s = max(deadline_s - state.timings.stage, deadline_s / 2)
    if node.drain is None:
        drain(state, node, Drain(said.reason, left_s, leaving=True))
        return
    node.drain.leaving = True
    for replica in _on(state, node):
        if replica.drain is not None and not replica.drain.moved:
            replica.drain.left_s = min(replica.drain.left_s, left_s)


def drain(state: ClusterState, node: Node, begun: Drain) -> None:
    """Give the node no new work, and end what it has."""
    node.drain = begun
    state.draining.add(node.node)
    if node.phase is NodePhase.LIVE:
        node.phase = NodePhase.DRAINING
    node.reason = begun.reason
    state.record("node_draining", node=node.node, reason=begun.reason, details={"left_s": f"{begun.left_s:g}"})
    for replica in _on(state, node):
        start_drain(state, replica, begun.reason, begun.left_s)
    state.replan = True


def undrain_asked(state: ClusterState, ask: AskId, asked: UndrainAsked) -> None:
    """Take the node back. A process that is on its way out cannot be."""
    node = state.nodes.get(asked.node)
    if node is None or node.phase is NodePhase.LOST:
        state.emit(AdminAnswered(ask, Reason(kind=ReasonKind.UNKNOWN_ID, text=f"no node {asked.node}")))
        return
    if node.drain is not None and node.drain.leaving:
        text = f"{node.node} is about to exit; start its daemon anew"
        state.emit(AdminAnswered(ask, Reason(kind=ReasonKind.DRAINING, text=text, node=node.node)))
        return
    if node.drain is not None:
        _undrain(state, node)
    state.emit(AdminAnswered(ask, None))


def _undrain(state: ClusterState, node: Node) -> None:
    node.drain = None
    node.reason = None
    if node.phase in (NodePhase.DRAINING, NodePhase.LEFT):
        node.phase = NodePhase.LIVE if node.known else NodePhase.UNREACHABLE
    state.send_worker(node, UndrainNode())
    state.record("node_undrained", node=node.node)
    for replica in _on(state, node):
        if not any(other.drain is not None for name in replica.nodes if (other := state.nodes.get(name)) is not None):
            stop_drain(state, replica)
    pardon_all(state, fresh=False)
    state.replan = True


def drained(state: ClusterState, node: Node) -> None:
    """The daemon's sequences are gone: what drains there is done."""
    for replica in _on(state, node):
        if replica.drain is not None:
            close(state, replica, replica.drain.reason)


def settle(state: ClusterState) -> None:
    """A draining node without a replica has left."""
    for name in sorted(state.draining):
        node = state.nodes.get(name)
        if node is None or node.drain is None:
            state.draining.discard(name)
        elif node.phase is NodePhase.DRAINING and not _on(state, node):
            left(state, node, node.drain.reason)


def _on(state: ClusterState, node: Node) -> list[Replica]:
    return [replica for replica in state.places.on(node.node) if replica.holds_devices]
