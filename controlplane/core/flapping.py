"""A node that comes and goes may join at once each time, but takes no ranks before it has stayed for a while."""

from __future__ import annotations

from collections import deque

from controlplane.core.entities import Node, NodePhase
from controlplane.core.recovery import pardon_all
from controlplane.core.state import ClusterState
from controlplane.runtime.messages.common import Reason, ReasonKind

LOSSES_FORGIVEN = 1
"""A daemon may be restarted without a reproach, and one that stayed for 10 F before it was lost does not flap."""


def lost(state: ClusterState, node: Node) -> None:
    """Remember it against the node's name if it had come only just before."""
    if node.worked and state.now - node.joined_at < state.timings.node_return:
        state.losses.setdefault(node.node, deque()).append(state.now)


def came(state: ClusterState, node: Node) -> None:
    """From the second such loss on it has to stay for F, 2 F, 4 F, … before anything is put there."""
    node.joined_at = state.now
    losses = state.losses.get(node.node, deque[float]())
    while losses and state.now - losses[0] > state.timings.regroup_window:
        losses.popleft()
    beyond = len(losses) - LOSSES_FORGIVEN
    if beyond <= 0:
        node.shunned_s = 0.0
        return
    node.shunned_s = min(state.timings.node_return, state.timings.failure_timeout * 2 ** (beyond - 1))
    text = f"lost {len(losses)} times soon after it came: it takes no ranks for {node.shunned_s:g} s"
    node.reason = Reason(kind=ReasonKind.LEASE_EXPIRED, text=text, node=node.node)
    state.record("node_shunned", node=node.node, reason=node.reason)


def stayed(state: ClusterState, node: Node, passed_s: float) -> None:
    """Time passed; once it was long enough, the node is as good as any."""
    if node.shunned_s <= 0 or node.phase is not NodePhase.LIVE:
        return
    node.shunned_s -= passed_s
    if node.shunned_s <= 0:
        node.reason = None
        state.record("node_trusted", node=node.node)
        pardon_all(state, fresh=True)
        state.replan = True
