"""The timeline of failures: each step of recovery notes here that it is done. Nothing is decided by it."""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.core.entities import Replica
from controlplane.core.failure import Failure, FailurePhase
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import RequestId
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.route import FirstToken, ReplicaEpoch, RouteCause, RouteEntry

PLANNED_KINDS = frozenset({ReasonKind.DRAINING, ReasonKind.REPLACED, ReasonKind.ADMIN})
"""Ends that were asked for are no failures."""

_LOST = (RouteCause.LOST, RouteCause.UNREACHABLE)


def closed(state: ClusterState, replica: Replica, reason: Reason, suspects: Sequence[RequestId]) -> None:
    """The replica's epoch is over, with the requests that it still held."""
    if reason.kind in PLANNED_KINDS:
        return
    node = state.nodes.get(reason.node)
    noticed = state.now if node is None or node.noticed is None else node.noticed
    failure = state.failures.of(replica.replica, replica.epoch)
    if failure is None or _is_another(state, failure, noticed):
        failure = state.failures.add(Failure(replica.replica, replica.epoch, noticed, reason))
    failure.reason, failure.node, failure.suspects = reason, reason.node, tuple(suspects)
    for request in replica.load.outstanding:
        _lose(state, failure, request)
    _reach(state, failure, FailurePhase.CLOSED)


def _is_another(state: ClusterState, failure: Failure, noticed: float) -> bool:
    """The record is of a link that broke and was mended long before: nobody waits for anything, the replica served."""
    mended = FailurePhase.CLOSED not in failure.phases and not (failure.homeless | failure.silent)
    return mended and noticed - failure.noticed > state.timings.failure_timeout


def fenced(state: ClusterState, replica: Replica) -> None:
    """The replica's next epoch stands in etcd."""
    for failure in _ended(state, replica):
        _reach(state, failure, FailurePhase.FENCED)


def regrouped(state: ClusterState, replica: Replica) -> None:
    """The replica serves again."""
    for failure in _ended(state, replica):
        failure.next_epoch = failure.next_epoch or replica.epoch
        _reach(state, failure, FailurePhase.REGROUPED)


def reported(state: ClusterState, entry: RouteEntry) -> None:
    """A gateway wants to replay a request: often the first news of a loss."""
    if entry.cause not in _LOST or not entry.exclude:
        return
    place: ReplicaEpoch = entry.exclude[-1]
    failure = state.failures.of(place.replica, place.epoch)
    if failure is None:
        text = f"a gateway replays what ran there: {entry.cause.name.lower()}"
        reason = Reason(kind=ReasonKind.SESSION_SILENT, text=text)
        failure = state.failures.add(Failure(place.replica, place.epoch, state.now, reason))
    _lose(state, failure, entry.request)


def routed(state: ClusterState, request: RequestId) -> None:
    """The request has a place."""
    failure = state.failures.waiting.get(request)
    if failure is not None:
        _house(state, failure, request)


def ended(state: ClusterState, request: RequestId) -> None:
    """The request needs no place any more."""
    failure = state.failures.waiting.pop(request, None)
    if failure is not None:
        failure.silent.discard(request)
        _house(state, failure, request)


def first_token(state: ClusterState, token: FirstToken) -> None:
    """A replayed request goes on: its gateway has a token of the new attempt."""
    failure = state.failures.waiting.pop(token.request, None)
    if failure is None:
        return
    failure.gap_ms_max = max(failure.gap_ms_max, token.gap_ms)
    failure.silent.discard(token.request)
    _reach(state, failure, FailurePhase.FIRST_TOKEN)
    _house(state, failure, token.request)


def _ended(state: ClusterState, replica: Replica) -> list[Failure]:
    """Failures of the replica's earlier epochs that it has not come back from."""
    return [
        failure
        for failure in state.failures.records
        if failure.replica == replica.replica
        and failure.epoch < replica.epoch
        and FailurePhase.REGROUPED not in failure.phases
    ]


def _lose(state: ClusterState, failure: Failure, request: RequestId) -> None:
    before = state.failures.waiting.get(request)
    if before is not None and before is not failure:
        before.silent.discard(request)
        _house(state, before, request)
    state.failures.waiting[request] = failure
    failure.lost.add(request)
    failure.homeless.add(request)
    failure.silent.add(request)


def _house(state: ClusterState, failure: Failure, request: RequestId) -> None:
    if request in failure.homeless:
        failure.homeless.discard(request)
        if not failure.homeless:
            # News of further losses may follow: the last one's new place counts.
            failure.phases[FailurePhase.REPLAYED] = state.now
    _tell_if_over(state, failure)


def _reach(state: ClusterState, failure: Failure, phase: FailurePhase) -> None:
    failure.phases.setdefault(phase, state.now)
    _tell_if_over(state, failure)


def _tell_if_over(state: ClusterState, failure: Failure) -> None:
    """Once, when all that follows a failure has come: its whole timeline, in seconds since it was noticed."""
    if failure.told or not failure.over:
        return
    failure.told = True
    times = {f"{phase.name.lower()}_s": f"{at - failure.noticed:.3f}" for phase, at in sorted(failure.phases.items())}
    counts = {"ended_epoch": failure.epoch, "requests": len(failure.lost), "gap_ms_max": failure.gap_ms_max}
    details = {**{name: str(count) for name, count in counts.items()}, **times}
    state.record(
        "failure_recovered", replica=state.replicas.get(failure.replica), reason=failure.reason, details=details
    )
