"""A replica whose steps take several times as long as its equals': a hot, throttled or shared device. Told, not judged:
it serves, and the scheduler already sends it less. If its deployment says so, its node is drained, as long as nobody
else is missing.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from controlplane.core import drains
from controlplane.core.entities import SERVING_PHASES, Drain, Replica
from controlplane.core.prediction import lone_step_s
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase, ReplicaSpec

SLOW = 3.0
"""Times the typical step of its equals; noise stays well below, and the scheduler's own correction too."""

DRAIN = "drain"
"""What a deployment says of slow nodes to have them drained."""

EQUALS_MIN = 3
"""Replicas at work, with the slow one: of two nobody can say which is the odd one."""


def tick(state: ClusterState, passed_s: float) -> None:
    """Count how long each replica has been slow; tell when that lasts, and when it is over."""
    at_work: dict[tuple[DeploymentId, ReplicaSpec | None], list[Replica]] = {}
    for replica in state.replicas.values():
        if replica.phase in SERVING_PHASES and replica.load.busy and replica.capacity is not None:
            at_work.setdefault((replica.deployment, replica.spec), []).append(replica)
    for equals in at_work.values():
        if len(equals) >= EQUALS_MIN:
            _compare(state, equals, passed_s)


def _compare(state: ClusterState, equals: list[Replica], passed_s: float) -> None:
    steps = {replica.replica: _step_s(replica) for replica in equals}
    typical = median(steps.values())
    for replica in equals:
        factor = steps[replica.replica] / typical if typical > 0 else 1.0
        if factor < SLOW:
            if replica.slow_s >= state.timings.slow_for:
                state.record("replica_recovered_pace", replica=replica)
            replica.slow_s = 0.0
            continue
        before, replica.slow_s = replica.slow_s, replica.slow_s + passed_s
        if replica.slow_s < state.timings.slow_for:
            continue
        reason = _reason(replica, factor)
        if before < state.timings.slow_for:
            state.record("replica_slowed", replica=replica, reason=reason)
        _drain(state, replica, reason)


def _drain(state: ClusterState, replica: Replica, reason: Reason) -> None:
    """Send its node away, if that is wanted and nobody else is missing. Which of several nodes is the slow one, their
    common steps do not tell."""
    deployment, node = state.deployments[replica.deployment], state.nodes[replica.nodes[0]]
    others = [other for other in deployment.replicas.values() if other is not replica]
    if deployment.record.slow_nodes != DRAIN or len(replica.nodes) > 1 or node.drain is not None or state.frozen:
        return
    if all(other.phase is ReplicaPhase.READY for other in others):
        drains.send_away(state, node, Drain(replace(reason, kind=ReasonKind.DRAINING), state.timings.drain))


def _step_s(replica: Replica) -> float:
    assert replica.capacity is not None
    return lone_step_s(replica.load, replica.capacity)


def _reason(replica: Replica, factor: float) -> Reason:
    text = f"its steps have taken {factor:.1f} times its equals' for {replica.slow_s:g} s"
    return Reason(kind=ReasonKind.SLOW, text=text, node=replica.nodes[0], group=replica.replica)
