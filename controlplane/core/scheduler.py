"""Which request runs where, and when: intake, the queue's order, and an optimised choice of replica.

A request is routed at once or waits; it is refused only with a code, a reason and, where trying again makes sense, a
delay. Replicas are kept short of work they could not start soon (the window), so that order is decided here, where
all of it is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from controlplane.core import failures, hopes
from controlplane.core.assignment import assign
from controlplane.core.entities import Deployment, Gateway, Replica, Request
from controlplane.core.fair_queue import Ticket
from controlplane.core.prediction import congestion_s, demand, fits, pace, predicted_s
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import NO_ATTEMPT, Attempt, RequestId
from controlplane.runtime.messages.common import Capacity, Permit, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import (
    EndEntry,
    ReplicaEpoch,
    RouteCause,
    RouteCode,
    Routed,
    RouteEntry,
    RouteRefused,
)

CRASHES_MAX = 2
"""A request that was in the unfinished step of this many dead engines is not run again."""

STUCK_MAX = 256
"""Waiting requests looked past, in one go, because no replica they may use has room."""


def route(state: ClusterState, gateway: Gateway, entry: RouteEntry) -> None:
    """Take a gateway's wish to run an attempt."""
    known = state.requests.get(entry.request)
    if known is not None:
        if entry.attempt < known.entry.attempt:
            state.fence("RouteEntry")
            # A late word of a gateway's own, which it will not heed; or a stream was resumed from a worker that never
            # saw the last attempts of the gateway it was resumed from.
            newest = known.entry.attempt
            reason = Reason(kind=ReasonKind.SUPERSEDED, text=f"attempt {newest} of it is known")
            refuse(state, gateway, entry, RouteCode.STALE_ATTEMPT, reason, newest=newest)
            return
        if entry.attempt == known.entry.attempt and _answer_again(state, gateway, known):
            return
        forget(state, entry.request)
    failures.reported(state, entry)
    refusal = _refusal(state, entry)
    if refusal is not None:
        refuse(state, gateway, entry, *refusal)
        return
    admit(state, gateway, entry)


def admit(state: ClusterState, gateway: Gateway, entry: RouteEntry, permit: Permit | None = None) -> Request:
    """Keep the request: in line, or running where `permit` says."""
    deadline = state.now + entry.remaining_ms / 1000 if entry.remaining_ms else None
    request = Request(entry, gateway.gateway, gateway.incarnation, state.now, deadline, permit)
    state.requests[entry.request] = request
    if permit is None:
        state.deployments[entry.deployment].queue.push(_ticket(entry))
        state.reroute.add(entry.deployment)
    return request


def end(state: ClusterState, ended: EndEntry) -> None:
    """The gateway is done with the request."""
    known = state.requests.get(ended.request)
    if known is None:
        return
    if ended.attempt < known.entry.attempt:
        state.fence("EndEntry")
        return
    forget(state, ended.request)


def forget(state: ClusterState, request: RequestId) -> None:
    """Drop the request and what is counted for it."""
    known = state.requests.pop(request)
    failures.ended(state, request)
    deployment = state.deployments.get(known.entry.deployment)
    if deployment is not None:
        deployment.queue.discard(request)
    uncount(state, known)


def uncount(state: ClusterState, request: Request) -> None:
    """It asks nothing of its replica any more."""
    permit = request.permit
    replica = state.replicas.get(permit.replica) if permit is not None else None
    if permit is None or replica is None or replica.epoch != permit.epoch:
        return
    replica.load.ended(permit.request)
    state.weigh(replica)
    state.reroute.add(replica.deployment)
    if replica.drain is not None and not replica.load.outstanding:
        state.replan = True


def lapse(state: ClusterState, permit: Permit) -> None:
    """A worker gave up waiting for the body of an assigned request."""
    known = state.requests.get(permit.request)
    if known is not None and known.permit == permit:
        uncount(state, known)


def refuse(
    state: ClusterState,
    gateway: Gateway,
    entry: RouteEntry,
    code: RouteCode,
    reason: Reason,
    retry_s: float = 0.0,
    newest: Attempt = NO_ATTEMPT,
) -> None:
    if gateway.link is not None:
        refused = RouteRefused(
            request=entry.request,
            attempt=entry.attempt,
            code=code,
            reason=reason,
            retry_ms=round(retry_s * 1000),
            newest_attempt=newest,
        )
        state.out.refused.setdefault(gateway.link.connection, []).append(refused)


def expire(state: ClusterState) -> None:
    """Refuse what waited too long: past its own deadline, or past the hope for a replica; and what waits in vain."""
    for deployment in state.deployments.values():
        if (failed := hopes.failed(deployment)) is not None:
            drop_queue(state, deployment, RouteCode.DEPLOYMENT_FAILED, failed)
        hopeless = hopes.hopeless(deployment)
        for name in list(deployment.queue):
            request = state.requests[name]
            if (gone := hopes.replaced(deployment, request.entry)) is not None:
                _drop(state, request, RouteCode.DEPLOYMENT_FAILED, gone)
            elif request.deadline is not None and state.now >= request.deadline:
                reason = Reason(kind=ReasonKind.DEADLINE, text="no replica took it before its deadline")
                _drop(state, request, RouteCode.DEADLINE, reason)
            elif hopeless is not None and state.now - request.arrived >= state.timings.node_return:
                _drop(state, request, RouteCode.NO_REPLICA, hopeless, state.timings.failure_timeout)
        if deployment.queue:
            state.reroute.add(deployment.record.deployment)


def drop_queue(
    state: ClusterState, deployment: Deployment, code: RouteCode, reason: Reason, retry_s: float = 0.0
) -> None:
    """Refuse all that waits for the deployment."""
    for name in list(deployment.queue):
        _drop(state, state.requests[name], code, reason, retry_s)


def dispatch(state: ClusterState, deployment: Deployment) -> None:
    """Assign as many waiting requests as the replicas' windows let in, first in line first."""
    queue = deployment.queue
    stuck: list[Ticket] = []
    while queue and len(stuck) < STUCK_MAX:
        replicas = _candidates(state, deployment)
        if not replicas:
            break
        tickets = _take_batch(state, deployment)
        left = _assign_batch(state, tickets, replicas)
        for replica in replicas:
            state.weigh(replica)
        stuck.extend(left)
        if len(left) == len(tickets) == 1 and state.requests[left[0].request].entry.n > 1:
            # it is first in line and needs more room than there is: later ones would keep taking what becomes free
            break
    queue.restore(stuck)


def has_room_for(state: ClusterState, leaving: Replica) -> bool:
    """Some replica of the same model would take one of its requests at once."""
    return any(
        _room(state, replica) > 0 and model_of(replica) == model_of(leaving)
        for replica in state.served_by(state.deployments[leaving.deployment])
    )


def model_of(replica: Replica) -> str:
    """Path of the model that it runs."""
    return replica.spec.model_path if replica.spec is not None else ""


def _take_batch(state: ClusterState, deployment: Deployment) -> list[Ticket]:
    """The first in line; one that takes several places makes a batch of its own."""
    tickets = deployment.queue.take(state.limits.assignment_batch_max)
    wide = [index for index, ticket in enumerate(tickets) if state.requests[ticket.request].entry.n > 1]
    cut = max(1, wide[0]) if wide else len(tickets)
    deployment.queue.restore(tickets[cut:])
    return tickets[:cut]


def _candidates(state: ClusterState, deployment: Deployment) -> list[Replica]:
    """Replicas with room, the least loaded first and no more than one batch may consider. To be weighed again."""
    found, ladder = list[Replica](), state.ladder_of(deployment)
    while len(found) < state.limits.assignment_replicas_max and (index := ladder.pop()) is not None:
        replica = deployment.replicas.get(index)
        if replica is None or not state.serves(replica):
            continue
        if _room(state, replica) <= 0:
            # So it is with all that are fuller.
            state.weigh(replica)
            break
        found.append(replica)
    return found


def _assign_batch(state: ClusterState, tickets: Sequence[Ticket], replicas: Sequence[Replica]) -> list[Ticket]:
    """Assign one batch at least cost; the tickets that found no place, in order."""
    requests = [state.requests[ticket.request] for ticket in tickets]
    entries = [request.entry for request in requests]
    steps_s = pace([replica.load for replica in replicas], [_capacity(replica) for replica in replicas])
    costs = [_costs(state, request, replicas, steps_s) for request in requests]
    room = [_room(state, replica) for replica in replicas]
    congestion = [
        congestion_s(entries, _capacity(replica), step_s) for replica, step_s in zip(replicas, steps_s, strict=True)
    ]
    left: list[Ticket] = []
    for ticket, request, choice in zip(tickets, requests, assign(costs, room, congestion), strict=True):
        if choice is None:
            left.append(ticket)
        else:
            _grant(state, request, replicas[choice])
    return left


def _costs(state: ClusterState, request: Request, replicas: Sequence[Replica], steps_s: Sequence[float]) -> list[float]:
    """Predicted seconds on each replica; inf where it may not run."""
    entry = request.entry
    excluded = set(entry.exclude)
    if excluded and _waited_out(state, request):
        ready = state.served_by(state.deployments[entry.deployment])
        if all(_name(replica) in excluded for replica in ready if hopes.runs(replica, entry)):
            excluded.clear()

    def may_run(replica: Replica) -> bool:
        barred = excluded and _name(replica) in excluded
        return (
            not barred
            and hopes.runs(replica, entry)
            and fits(entry, _capacity(replica))
            and _takes(state, replica, entry)
        )

    return [
        predicted_s(entry, replica.load, _capacity(replica), step_s) if may_run(replica) else inf
        for replica, step_s in zip(replicas, steps_s, strict=True)
    ]


def _waited_out(state: ClusterState, request: Request) -> bool:
    """Nothing but what the gateway excluded is there: worth another try, but not at once."""
    return state.now - request.arrived >= state.timings.heartbeat_interval


def _grant(state: ClusterState, request: Request, replica: Replica) -> None:
    """Give the permit: to the worker so that it reserves, to the gateway so that it sends the body."""
    entry = request.entry
    driver = state.driver(replica)
    assert driver is not None
    assert driver.link is not None
    permit = Permit(
        request=entry.request,
        attempt=entry.attempt,
        replica=replica.replica,
        epoch=replica.epoch,
        term=state.term,
        solo=entry.crashes > 0,
        priority=entry.priority,
    )
    request.permit = permit
    failures.routed(state, entry.request)
    state.out.replayed[replica.replica] += entry.cause is not RouteCause.NEW
    state.out.assigned.setdefault(driver.link.connection, []).append(permit)
    cached = replica.load.cached_blocks(entry.prefix_hashes)
    replica.load.assigned(entry.request, demand(entry, _capacity(replica), cached), entry.prefix_hashes)
    _send_routed(state, state.gateways[request.gateway], permit, replica)


def _send_routed(state: ClusterState, gateway: Gateway, permit: Permit, replica: Replica) -> None:
    driver = state.nodes[replica.members[0].node]
    if gateway.link is not None:
        routed = Routed(permit=permit, serve_address=driver.serve_address, node=driver.node)
        state.out.routed.setdefault(gateway.link.connection, []).append(routed)


def _answer_again(state: ClusterState, gateway: Gateway, known: Request) -> bool:
    """The same attempt was asked for again: say the same, if it still holds."""
    if known.permit is None:
        known.gateway, known.incarnation = gateway.gateway, gateway.incarnation
        return True
    replica = state.replicas.get(known.permit.replica)
    if replica is None or replica.epoch != known.permit.epoch or replica.phase is not ReplicaPhase.READY:
        return False
    _send_routed(state, gateway, known.permit, replica)
    return True


def _refusal(state: ClusterState, entry: RouteEntry) -> tuple[RouteCode, Reason, float] | None:
    """Why the entry is not even let into the queue."""
    deployment = state.deployments.get(entry.deployment)
    if deployment is None or deployment.removed:
        reason = Reason(kind=ReasonKind.UNKNOWN_ID, text=f"no deployment {entry.deployment}")
        return RouteCode.UNKNOWN_DEPLOYMENT, reason, 0.0
    if entry.crashes >= CRASHES_MAX:
        text = f"it was in the unfinished step of {entry.crashes} engines that died"
        return RouteCode.POISON, Reason(kind=ReasonKind.POISON, text=text), 0.0
    if (reason := hopes.replaced(deployment, entry)) is not None:
        return RouteCode.DEPLOYMENT_FAILED, reason, 0.0
    if (reason := hopes.too_long(entry, deployment)) is not None:
        return RouteCode.TOO_LONG, reason, 0.0
    if (reason := hopes.failed(deployment)) is not None:
        return RouteCode.DEPLOYMENT_FAILED, reason, 0.0
    hopeless = hopes.hopeless(deployment)
    if hopeless is not None and hopeless.kind is not ReasonKind.NO_CAPACITY:
        return RouteCode.NO_REPLICA, hopeless, state.timings.failure_timeout
    waiting = sum(other.queue.new for other in state.deployments.values())
    if entry.cause is RouteCause.NEW and waiting >= state.limits.queued_requests_max:
        reason = Reason(kind=ReasonKind.OVERLOADED, text=f"{waiting} requests wait already")
        return RouteCode.OVERLOADED, reason, _retry_s(state, deployment)
    return None


def _retry_s(state: ClusterState, deployment: Deployment) -> float:
    """Longer the longer the queue: between one heartbeat interval and the failure timeout."""
    window = sum(_window(state, replica) for replica in state.served_by(deployment))
    rounds = len(deployment.queue) / window if window else inf
    return min(state.timings.failure_timeout, state.timings.heartbeat_interval * (1 + rounds))


def _drop(state: ClusterState, request: Request, code: RouteCode, reason: Reason, retry_s: float = 0.0) -> None:
    gateway = state.gateways.get(request.gateway)
    if gateway is not None:
        refuse(state, gateway, request.entry, code, reason, retry_s)
    forget(state, request.entry.request)


def _window(state: ClusterState, replica: Replica) -> int:
    return state.limits.window_batches * _capacity(replica).max_sequences


def _room(state: ClusterState, replica: Replica) -> int:
    return max(0, _window(state, replica) - replica.load.sequences)


def _takes(state: ClusterState, replica: Replica, entry: RouteEntry) -> bool:
    """Its choices fit into the window; more choices than the window go to an idle replica."""
    return entry.n <= _room(state, replica) or replica.load.sequences == 0


def _capacity(replica: Replica) -> Capacity:
    assert replica.capacity is not None, f"{replica.replica} serves without a capacity"
    return replica.capacity


def _name(replica: Replica) -> ReplicaEpoch:
    return ReplicaEpoch(replica=replica.replica, epoch=replica.epoch)


def _ticket(entry: RouteEntry) -> Ticket:
    return Ticket(
        request=entry.request,
        priority=entry.priority,
        replay=entry.cause is not RouteCause.NEW,
        tenant=entry.tenant,
    )
