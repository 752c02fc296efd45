"""Desired state against actual state: which replicas there should be, and a place for those that have none.

`reconcile` runs after every step that changed something it looks at. It does nothing that needs etcd while frozen.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count, islice

from controlplane.core import spares
from controlplane.core.devices import free_nodes, may_place
from controlplane.core.elastic import choices, full_place, grow_reason, is_shrunk, may_shrink, outgrown, serving
from controlplane.core.entities import Deployment, Replica
from controlplane.core.groups import place
from controlplane.core.placement import plan
from controlplane.core.recovery import bury, retire, settle_drains, start_drain
from controlplane.core.scheduler import model_of
from controlplane.core.state import ClusterState
from controlplane.core.stock import Wanted
from controlplane.runtime.ids import Epoch, ReplicaId
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase


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
        spares.settle(state)


def _settle(state: ClusterState, deployment: Deployment) -> None:
    """Make the deployment's replicas those that are wanted. To be done again when it or one of them changes."""
    deployment.settled = True
    _let_stand_in_stay(state, deployment)
    _add_missing(state, deployment)
    _retire_surplus(state, deployment)
    _grow(state, deployment)
    leaving = any(
        replica.retiring or replica.phase is ReplicaPhase.DRAINING for replica in deployment.replicas.values()
    )
    if _roll(state, deployment) or leaving or len(deployment.replicas) > deployment.record.replicas:
        deployment.settled = False
    if deployment.removed and not deployment.replicas:
        del state.deployments[deployment.record.deployment]


def _staying(deployment: Deployment) -> list[Replica]:
    """The replicas that are to be, by number: first as many as are desired, then one that stands in. One that goes
    keeps its place among them until it is gone, so that its successor has its name."""
    desired = _desired(deployment)
    return sorted(
        (one for one in deployment.replicas.values() if not one.retiring or one.index < desired),
        key=lambda replica: replica.index,
    )


def _desired(deployment: Deployment) -> int:
    return 0 if deployment.removed else deployment.record.replicas


def _stand_in(deployment: Deployment) -> Replica | None:
    """One more than desired, while another leaves in order or is to be replaced."""
    staying = _staying(deployment)[_desired(deployment) :]
    return staying[0] if staying else None


def _target(state: ClusterState, deployment: Deployment) -> int:
    """Replicas that there are to be now: as many as desired, and one more while one of them leaves in order or is to be
    replaced, if that has a place; it goes once all the others serve. So that a planned change takes nobody's last
    replica before another serves."""
    desired = _desired(deployment)
    own = _staying(deployment)[:desired]
    if len(own) == desired and all(_is_settled(state, deployment, replica) for replica in own):
        return desired
    if _stand_in(deployment) is not None:
        return desired + 1
    placed = [replica for replica in own if replica.holds_devices]
    leaving = any(_leaves(state, deployment, replica) for replica in placed) and len(placed) == desired
    undisturbed = not any(replica.retiring for replica in deployment.replicas.values())
    return desired + (leaving and undisturbed and may_place(state) and bool(full_place(state, deployment)))


def _let_stand_in_stay(state: ClusterState, deployment: Deployment) -> None:
    """One that has had no place for long goes for the one that serves instead: should it come back, all that runs there
    would move once more, for nothing."""
    stand_in = _stand_in(deployment)
    if stand_in is None or stand_in.phase is not ReplicaPhase.READY or stand_in.spec != deployment.record.spec:
        return
    for replica in _staying(deployment)[: _desired(deployment)]:
        if replica.phase is ReplicaPhase.HELD and replica.homeless_s >= state.timings.node_return:
            text = f"{stand_in.replica} has served in its place for {state.timings.node_return:g} s"
            retire(state, replica, Reason(kind=ReasonKind.REPLACED, text=text))
            return


def _is_settled(state: ClusterState, deployment: Deployment, replica: Replica) -> bool:
    return replica.phase is ReplicaPhase.READY and not _leaves(state, deployment, replica)


def _leaves(state: ClusterState, deployment: Deployment, replica: Replica) -> bool:
    """It serves, but is to be replaced, or drains to have its place back later."""
    if replica.phase is ReplicaPhase.READY:
        shrunk = is_shrunk(deployment.record, replica)
        return (shrunk and replica in _outgrown(state, deployment)) or _is_outdated(deployment, replica)
    return replica.phase is ReplicaPhase.DRAINING and not replica.retiring


def _is_outdated(deployment: Deployment, replica: Replica) -> bool:
    return replica.spec != deployment.record.spec and not is_shrunk(deployment.record, replica)


def _outgrown(state: ClusterState, deployment: Deployment) -> list[Replica]:
    """Shrunk replicas to end next, so that one gets its full size: one after the other where the one that stands in for
    them has it already."""
    stand_in = _stand_in(deployment)
    if stand_in is None or not stand_in.holds_devices or stand_in.spec != deployment.record.spec:
        return outgrown(state, deployment)
    return serving(deployment)[:1]


def _add_missing(state: ClusterState, deployment: Deployment) -> None:
    missing = _target(state, deployment) - len(_staying(deployment))
    unused = (index for index in count() if index not in deployment.replicas)
    for index in list(islice(unused, max(0, missing))):
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
    for replica in reversed(_staying(deployment)[_target(state, deployment) :]):
        text = f"{deployment.record.deployment} is to have {_desired(deployment)} replicas"
        retire(state, replica, Reason(kind=ReasonKind.ADMIN, text=text))
    for replica in list(deployment.replicas.values()):
        if replica.retiring and not replica.holds_devices:
            bury(state, deployment, replica)


def _roll(state: ClusterState, deployment: Deployment) -> bool:
    """Replace replicas of an older spec, one at a time, and only while all others serve. False: there is none."""
    outdated = [
        replica
        for replica in deployment.replicas.values()
        if replica.holds_devices and not replica.retiring and _is_outdated(deployment, replica)
    ]
    if not outdated:
        return False
    reason = Reason(kind=ReasonKind.REPLACED, text=f"the spec of {deployment.record.deployment} changed")
    idle = [replica for replica in outdated if replica.phase not in (ReplicaPhase.READY, ReplicaPhase.DRAINING)]
    for replica in idle:
        if not replica.adopting:
            start_drain(state, replica, reason, left_s=0.0)
    steady = all(
        replica.phase is ReplicaPhase.READY or _is_hopeless(state, deployment, replica)
        for replica in deployment.replicas.values()
    )
    if steady:
        first = min(outdated, key=lambda replica: replica.index)
        # Another model cannot go on with its requests, so they are given time to end.
        others = model_of(first) != deployment.record.spec.model_path
        start_drain(state, first, reason, left_s=state.timings.drain if others else 0.0)
    return True


def _grow(state: ClusterState, deployment: Deployment) -> None:
    """End the replica that outgrew its place, or those whose places make a full one, so that it gets its full size;
    their requests move. Only while nobody else is on his way: one that has no place at all waits for nothing that this
    would take."""
    growing, stand_in = _outgrown(state, deployment), _stand_in(deployment)
    if not growing or _is_one_moving(state):
        return
    steady = all(
        replica.phase is ReplicaPhase.READY
        or _is_hopeless(state, deployment, replica)
        or not (replica is stand_in or replica.holds_devices or replica.retiring)
        for replica in deployment.replicas.values()
    )
    if steady:
        reason = grow_reason(deployment.record, growing)
        for replica in growing:
            start_drain(state, replica, reason, left_s=0.0)


def _is_one_moving(state: ClusterState) -> bool:
    """Somebody, of whatever deployment, ends in order, or has ended and was not looked at since: what is free, or is
    about to be, may be his next place."""
    closed = (one for one in state.places.homeless.values() if one.phase is ReplicaPhase.CLOSED and not one.retiring)
    drains = (one.drain for one in state.places.draining.values() if one.drain is not None)
    return any(closed) or any(drain.reason.kind is ReasonKind.REPLACED for drain in drains)


def _is_hopeless(state: ClusterState, deployment: Deployment, replica: Replica) -> bool:
    """Nobody need wait for it: it is one more than desired, and there is no place for it."""
    extra = replica is _stand_in(deployment)
    return extra and replica.phase is ReplicaPhase.HELD and not full_place(state, deployment)


def _place_homeless(state: ClusterState) -> None:
    waiting = list(filter(_wants_place, state.places.homeless.values()))
    if not waiting:
        return
    whose = {replica.deployment: state.deployments[replica.deployment] for replica in waiting}
    served = {name: _has_place(deployment) for name, deployment in whose.items()}
    shrinking = {name: may_shrink(state, deployment) for name, deployment in whose.items()}
    homeless = {
        replica.replica: (state.deployments[replica.deployment], replica)
        for replica in sorted(waiting, key=lambda one: (served[one.deployment], one.deployment, one.index))
    }
    wanted = [_wanted(state, *one, shrinks=shrinking[one[0].record.deployment]) for one in homeless.values()]
    nodes = free_nodes(state, also=[member.node for replica in waiting for member in replica.members])
    for name, made in plan(wanted, nodes, state.places.siblings).items():
        deployment, replica = homeless[name]
        if made.members:
            place(state, replica, replace(deployment.record.spec, degrees=made.degrees), made.members, made.reason)
        else:
            _hold(state, replica, made.reason)


def _has_place(deployment: Deployment) -> bool:
    """A model that nobody serves comes first."""
    return any(replica.holds_devices for replica in deployment.replicas.values())


def _wanted(state: ClusterState, deployment: Deployment, replica: Replica, *, shrinks: bool) -> Wanted:
    degrees = deployment.record.spec.degrees
    return Wanted(
        replica=replica.replica,
        deployment=replica.deployment,
        degrees=degrees,
        previous=replica.members,
        smaller=choices(state, replica, degrees) if shrinks else (),
    )


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
