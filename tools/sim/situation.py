"""What is going on in a world: told with every fault, so that a campaign can say what it struck."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from controlplane.core.entities import LeaderPhase, NodePhase
from controlplane.core.state import ClusterState
from controlplane.runtime.messages.common import ReplicaPhase

if TYPE_CHECKING:
    from tools.sim.world import World

_REGROUP = frozenset({ReplicaPhase.PLANNED, ReplicaPhase.PREPARING, ReplicaPhase.FORMING})


def under_way(world: World) -> set[str]:
    """Names of all that is under way; "calm" if nothing is."""
    leader = world.leader()
    state = leader.state if leader is not None else None
    names = {"an election"} if state is None else set(_of_leader(state))
    if state is not None and any(deployment.record != world.wanted for deployment in state.deployments.values()):
        names.add("a change of scale or spec")
    return names or {"calm"}


def _of_leader(state: ClusterState) -> Iterator[str]:
    if state.phase is LeaderPhase.REBUILDING:
        yield "a leader's grace"
    if state.phase is LeaderPhase.FROZEN:
        yield "a frozen leader"
    phases = {replica.phase for replica in state.replicas.values()}
    if phases & _REGROUP:
        yield "a regroup"
    if ReplicaPhase.LOADING in phases:
        yield "a load"
    if ReplicaPhase.DRAINING in phases or any(node.phase is NodePhase.DRAINING for node in state.nodes.values()):
        yield "a drain"
    if any(not deployment.settled for deployment in state.deployments.values()):
        yield "a change of scale or spec"
