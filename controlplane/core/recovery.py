"""How replicas end: closed by failure, or drained in order. Everything after a death is this one path.

Closing is done in memory first: gateways are told and replay at once, no etcd needed. The next epoch is written before
any of it is prepared (groups.py), once a place is found (deployments.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from controlplane.core import failures
from controlplane.core.degrees import ranks_of
from controlplane.core.entities import FORMING_PHASES, GIVEN_UP, SERVING_PHASES, Deployment, Drain, Fault, Node, Replica
from controlplane.core.load import Load
from controlplane.core.messages import DeletePlacement, WritePlacement
from controlplane.core.scheduler import has_room_for
from controlplane.core.stall import Stall
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import RequestId
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import MoveRequests, ReplicaClosed
from controlplane.runtime.messages.session import AbortGroup, ReleaseReplica, ReplicaLoad
from controlplane.runtime.records import PlacementRecord

LASTING = frozenset({ReasonKind.INVALID, ReasonKind.LOAD_FAILED, ReasonKind.OUT_OF_MEMORY})
"""Trying again does not mend these: the model is refused, its files cannot be read, it is too large."""


def close(state: ClusterState, replica: Replica, reason: Reason, suspects: Sequence[RequestId] = ()) -> None:
    """End the replica's epoch. What follows (another epoch, or none) is for `reconcile`."""
    assert replica.holds_devices, f"{replica.replica} is closed twice"
    begun = replica.adopting or replica.phase in FORMING_PHASES | SERVING_PHASES
    if replica.adopting or replica.phase in SERVING_PHASES:
        state.send_gateways(
            ReplicaClosed(replica=replica.replica, epoch=replica.epoch, reason=reason, suspects=tuple(suspects))
        )
    if begun:
        end = ReleaseReplica if replica.retiring else AbortGroup
        for node in _nodes(state, replica):
            state.send_worker(node, end(replica=replica.replica, epoch=replica.epoch, reason=reason))
        failures.closed(state, replica, reason, suspects)
    details = {"requests": str(len(replica.load.outstanding)), "suspects": ",".join(suspects)}
    state.record("replica_closed", replica=replica, reason=reason, details=details)
    _reset(replica, ReplicaPhase.CLOSED, reason)
    state.row_changed(replica)
    state.replan = True
    state.reroute.add(replica.deployment)


def _reset(replica: Replica, phase: ReplicaPhase, reason: Reason) -> None:
    replica.phase = phase
    replica.reason = reason
    replica.adopting = False
    replica.acked.clear()
    replica.load, replica.stall = Load(), Stall()
    replica.drain = None
    replica.slow_s = replica.homeless_s = replica.roomy_s = replica.retry_s = 0.0


def fail(state: ClusterState, replica: Replica, reason: Reason, suspects: Sequence[RequestId] = ()) -> None:
    """Close after a failure. One on the way to READY, or right after it, counts against the replica's budget."""
    young = replica.phase not in SERVING_PHASES or replica.served_s < state.timings.stage
    charged = young and not replica.adopting
    if reason.kind is ReasonKind.OUT_OF_MEMORY and charged and replica.spec is not None:
        replica.oom_ranks = max(replica.oom_ranks, ranks_of(replica.spec.degrees))
    close(state, replica, reason, suspects)
    if not charged:
        return
    recent = replica.failures
    recent.append(Fault(state.now, reason.kind))
    while state.now - recent[0].at > state.timings.regroup_window:
        recent.popleft()
    if len(recent) >= state.limits.regroup_failures_max:
        _give_up(state, replica, reason)
    else:
        # at once, then after one interval, three, seven, ...
        replica.retry_s = state.timings.heartbeat_interval * (2 ** (len(recent) - 1) - 1)


def _give_up(state: ClusterState, replica: Replica, reason: Reason) -> None:
    """The budget is spent. Each time for a reason that lasts: only another wish, or another node, can help."""
    lasting = all(fault.kind in LASTING for fault in replica.failures)
    replica.phase = ReplicaPhase.FAILED if lasting else ReplicaPhase.DEGRADED
    state.row_changed(replica)
    name = "replica_failed" if lasting else "replica_degraded"
    state.record(name, replica=replica, reason=reason, details={"failures": str(len(replica.failures))})


def pardon(state: ClusterState, replica: Replica) -> None:
    """Something changed for the better: try again with a fresh budget."""
    replica.failures.clear()
    replica.oom_ranks = 0
    if replica.phase in GIVEN_UP:
        replica.phase = ReplicaPhase.CLOSED
        state.record("replica_pardoned", replica=replica, reason=replica.reason)
    replica.retry_s = 0.0
    state.row_changed(replica)
    state.replan = True


def pardon_all(state: ClusterState, *, fresh: bool) -> None:
    """There is more than there was. `fresh`: not what was there before, so that what failed there may do."""
    for replica in list(state.places.given_up.values()):
        if fresh or replica.phase is ReplicaPhase.DEGRADED:
            pardon(state, replica)


def close_on(state: ClusterState, node: Node, reason: Reason) -> None:
    """Close whatever runs, forms or was running on the node."""
    for replica in state.places.on(node.node):
        if replica.holds_devices:
            fail(state, replica, reason)


# ---------------------------------------------------------------- ending in order


def start_drain(state: ClusterState, replica: Replica, reason: Reason, left_s: float) -> None:
    """No new work; what runs may end within `left_s` seconds, then moves. A replica that does not serve just ends."""
    if not replica.holds_devices or replica.phase is ReplicaPhase.DRAINING:
        return
    if replica.phase is not ReplicaPhase.READY:
        close(state, replica, reason)
        return
    replica.phase = ReplicaPhase.DRAINING
    replica.reason = reason
    replica.drain = Drain(reason, left_s, window_s=left_s, requests=len(replica.load.outstanding))
    if (deployment := state.deployments.get(replica.deployment)) is not None:
        deployment.settled = False
    state.record("replica_draining", replica=replica, reason=reason)
    state.row_changed(replica)
    state.replan = True
    if left_s <= 0:
        _move(state, replica, replica.drain)


def stop_drain(state: ClusterState, replica: Replica) -> None:
    """Serve on, if nothing was moved yet."""
    if replica.drain is None or replica.drain.moved or replica.retiring:
        return
    replica.phase, replica.drain, replica.reason = ReplicaPhase.READY, None, None
    state.record("replica_undrained", replica=replica)
    state.row_changed(replica)
    state.reroute.add(replica.deployment)


def settle_drains(state: ClusterState) -> None:
    """Close draining replicas that have nothing left to do."""
    for replica in list(state.places.draining.values()):
        if replica.drain is not None and not replica.load.outstanding:
            close(state, replica, replica.drain.reason)


def _move(state: ClusterState, replica: Replica, drain: Drain) -> None:
    """Tell the gateways to run elsewhere what still runs; they have one stage for it."""
    drain.moved = True
    drain.left_s = state.timings.stage
    state.send_gateways(
        MoveRequests(
            replica=replica.replica,
            epoch=replica.epoch,
            deadline_ms=round(drain.left_s * 1000),
            reason=drain.reason,
        )
    )
    moving = len(replica.load.outstanding)
    state.record("requests_moved", replica=replica, reason=drain.reason, details={"requests": str(moving)})


def _move_some(state: ClusterState, replica: Replica, drain: Drain) -> None:
    """Move running requests one after another, as the window passes, while others have room: each then waits for its
    own prompt only, where moving all at once makes them wait for each other's. The youngest go first: they have the
    longest way before them and the least behind them."""
    keep = ceil(drain.requests * drain.left_s / drain.window_s)
    excess = len(replica.load.outstanding) - keep
    if excess <= 0 or not has_room_for(state, replica):
        return
    youngest = sorted(replica.load.outstanding, key=lambda name: (state.requests[name].arrived, name), reverse=True)
    move = MoveRequests(
        replica=replica.replica,
        epoch=replica.epoch,
        requests=tuple(youngest[:excess]),
        deadline_ms=round(drain.left_s * 1000),
        reason=drain.reason,
    )
    state.send_gateways(move)


def retire(state: ClusterState, replica: Replica, reason: Reason) -> None:
    """End the replica for good: its requests move, then its ranks exit and its devices are free."""
    if replica.retiring:
        return
    replica.retiring = True
    if not replica.holds_devices:
        replica.reason = reason
    start_drain(state, replica, reason, left_s=0.0)
    state.replan = True


def bury(state: ClusterState, deployment: Deployment, replica: Replica) -> None:
    """Forget a closed replica that is retired. Its record keeps its epoch, unless its deployment goes too."""
    assert not replica.holds_devices
    assert replica.retiring
    write = state.mint_write()
    if deployment.removed:
        state.emit(DeletePlacement(write, replica.replica))
    else:
        gone = PlacementRecord(
            replica=replica.replica, deployment=replica.deployment, epoch=replica.epoch, term=state.term
        )
        state.emit(WritePlacement(write, gone))
    replica.phase = ReplicaPhase.CLOSED
    del deployment.replicas[replica.index]
    del state.replicas[replica.replica]
    # It kept its number while it was there: if it is wanted again, its successor can come now.
    deployment.settled = False
    state.replan = True
    state.row_changed(replica)
    state.record("replica_retired", replica=replica, reason=replica.reason)


# ---------------------------------------------------------------- work and time


def load_heard(state: ClusterState, replica: Replica, load: ReplicaLoad, ack: int) -> None:
    """The driver's account of what the replica does."""
    replica.stall.heard(load)
    replica.load.heard(load, ack)
    state.weigh(replica)
    state.reroute.add(replica.deployment)


def tick(state: ClusterState, passed_s: float) -> None:
    """Judge what waits: stages of a group, work without progress, drains, backoff."""
    for replica in list(state.replicas.values()):
        replica.retry_s = max(0.0, replica.retry_s - passed_s)
        if replica.phase in FORMING_PHASES:
            _judge_stage(state, replica, passed_s)
        elif replica.phase in SERVING_PHASES:
            replica.served_s += passed_s
            _judge_progress(state, replica)
        elif not replica.holds_devices:
            replica.homeless_s += passed_s
        if replica.drain is not None:
            _judge_drain(state, replica, replica.drain, passed_s)
    state.replan = True


def forgive_silence(state: ClusterState) -> None:
    """The judge itself was away: nothing that stood still meanwhile is anyone's fault."""
    for replica in state.replicas.values():
        replica.stall.restart()


def stage_s(state: ClusterState, replica: Replica) -> float:
    """How long the replica's present stage may take; of a load: may stand still.

    Before a rank can prepare it must be out of its last epoch: one that is stuck there is killed only after the
    collective timeout.
    """
    match replica.phase:
        case ReplicaPhase.PREPARING:
            return state.timings.stage + state.timings.collective_timeout
        case ReplicaPhase.LOADING:
            return state.timings.load_progress
        case _:
            return state.timings.stage


def _judge_stage(state: ClusterState, replica: Replica, passed_s: float) -> None:
    """A node that is late says so itself, with a better reason: it is given one interval to."""
    replica.stage_s += passed_s
    limit = stage_s(state, replica)
    if replica.stage_s < limit + state.timings.heartbeat_interval:
        return
    missing = sorted(set(replica.nodes) - replica.acked)
    what = "its load stood still" if replica.phase is ReplicaPhase.LOADING else replica.phase.name.lower()
    text = f"{what} for {limit:g} s; no answer from {', '.join(missing)}"
    fail(state, replica, Reason(kind=ReasonKind.DEADLINE, text=text, node=missing[0], group=replica.replica))


def _judge_progress(state: ClusterState, replica: Replica) -> None:
    """Only with sessions to all its nodes: a silent one is judged by its silence."""
    stalled_s, driver = replica.stall.seconds, state.driver(replica)
    if stalled_s < state.timings.progress_deadline or driver is None:
        return
    text = f"its progress counter stood still for {stalled_s:g} s with work to do"
    fail(state, replica, Reason(kind=ReasonKind.NO_PROGRESS, text=text, node=driver.node, group=replica.replica))


def _judge_drain(state: ClusterState, replica: Replica, drain: Drain, passed_s: float) -> None:
    drain.left_s -= passed_s
    if drain.left_s > 0:
        if not drain.moved:
            _move_some(state, replica, drain)
        return
    if drain.moved:
        close(state, replica, drain.reason)
    else:
        _move(state, replica, drain)


def _nodes(state: ClusterState, replica: Replica) -> list[Node]:
    """Its nodes that can be told."""
    return [node for name in replica.nodes if (node := state.nodes.get(name)) is not None and node.link is not None]
