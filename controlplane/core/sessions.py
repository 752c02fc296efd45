"""Frames of sessions: fenced by term and session, then handed to whom they concern."""

from __future__ import annotations

from typing import assert_never

from controlplane.core import adoption, drains, failures, gateways, groups, membership, ranks, recovery, scheduler
from controlplane.core.entities import Gateway, Link, Node
from controlplane.core.messages import (
    CloseConnection,
    GatewayClosed,
    GatewayOpened,
    GatewaySaid,
    SendGateway,
    SendWorker,
    WorkerClosed,
    WorkerOpened,
    WorkerSaid,
)
from controlplane.core.state import ClusterState
from controlplane.runtime.messages.common import Head, Reason, ReasonKind
from controlplane.runtime.messages.route import (
    EndBatch,
    FirstTokens,
    GatewayHeartbeat,
    GatewayHello,
    Inventory,
    Locate,
    RouteBatch,
    RouteUp,
)
from controlplane.runtime.messages.session import (
    AssignLapsed,
    AttachUp,
    Drained,
    Fenced,
    GroupState,
    Heartbeat,
    Leaving,
    LoadProgress,
    RankState,
    SessionRefused,
    WorkerHello,
    WorkerSnapshot,
)
from controlplane.runtime.messages.weights import WeightsState


def opened(state: ClusterState, event: WorkerOpened | GatewayOpened) -> None:
    hello = event.hello
    refusal: Reason | None = None
    if hello.cluster != state.cluster:
        refusal = Reason(kind=ReasonKind.INVALID, text=f"this is cluster {state.cluster}, not {hello.cluster}")
    elif hello.highest_term_seen > state.term:
        refusal = Reason(kind=ReasonKind.STALE_TERM, text=f"term {hello.highest_term_seen} was seen")
    elif isinstance(hello, WorkerHello):
        refusal = membership.holder_of(state, hello)
    if refusal is not None:
        _refuse(state, event, refusal)
        if hello.highest_term_seen > state.term:
            membership.step_down(state, refusal, highest_term=hello.highest_term_seen)
    elif isinstance(hello, WorkerHello):
        membership.welcome(state, event.connection, hello)
    else:
        gateways.welcome(state, event.connection, hello)


def _refuse(state: ClusterState, event: WorkerOpened | GatewayOpened, reason: Reason) -> None:
    hello = event.hello
    send = SendWorker if isinstance(hello, WorkerHello) else SendGateway
    highest = max(state.term, hello.highest_term_seen)
    state.emit(send(event.connection, SessionRefused(reason=reason, highest_term=highest)))
    state.emit(CloseConnection(event.connection, reason))
    name = hello.node if isinstance(hello, WorkerHello) else hello.gateway
    state.record("session_refused", reason=reason, details={"peer": name})


def closed(state: ClusterState, event: WorkerClosed | GatewayClosed) -> None:
    link = state.links.pop(event.connection, None)
    if link is None or link.owner.link is not link:
        return
    if isinstance(link.owner, Node):
        membership.broken(state, link.owner)
    else:
        gateways.broken(state, link.owner)


def _admitted(state: ClusterState, event: WorkerSaid | GatewaySaid) -> Link | None:
    """The frame's session, if the frame belongs to it and to this term; else it is counted and dropped."""
    kind = type(event.body).__name__
    if isinstance(event.body, Fenced):
        _peer_fenced(state, event.body)
        kind = ""
    if event.head.term > state.term:
        reason = Reason(kind=ReasonKind.STALE_TERM, text=f"a frame of term {event.head.term} came")
        membership.step_down(state, reason, highest_term=event.head.term)
        return None
    link = state.links.get(event.connection)
    if link is None or event.head.term != state.term or event.head.session != link.session:
        if kind:
            state.fence(kind)
        return None
    return link


def _peer_fenced(state: ClusterState, fenced: Fenced) -> None:
    """A peer refused a frame of ours."""
    state.fence(f"peer:{fenced.frame}")
    if fenced.highest_term > state.term:
        reason = Reason(kind=ReasonKind.STALE_TERM, text=f"a peer knows term {fenced.highest_term}")
        membership.step_down(state, reason, highest_term=fenced.highest_term)


def worker_said(state: ClusterState, event: WorkerSaid) -> None:
    link = _admitted(state, event)
    if link is None or not isinstance(link.owner, Node):
        return
    node = link.owner
    membership.heard(state, node)
    if isinstance(event.body, WorkerSnapshot):
        adoption.snapshot(state, node, event.body)
    elif node.known:
        _worker_frame(state, node, event.head, event.body)
    elif not isinstance(event.body, Heartbeat | Fenced):
        state.fence(type(event.body).__name__)


def _worker_frame(state: ClusterState, node: Node, head: Head, body: AttachUp) -> None:
    match body:
        case Heartbeat():
            _heartbeat(state, node, head, body)
        case RankState():
            ranks.rank_changed(state, node, body)
        case GroupState():
            groups.answered(state, node, body)
        case LoadProgress():
            groups.load_moved(state, node, body)
        case AssignLapsed():
            for permit in body.permits:
                scheduler.lapse(state, permit)
        case Drained():
            drains.drained(state, node)
        case Leaving():
            drains.leaving(state, node, body)
        case WeightsState():
            ranks.weights_changed(state, node, body)
        case WorkerHello() | WorkerSnapshot() | Fenced():
            pass
        case _:
            assert_never(body)


def _heartbeat(state: ClusterState, node: Node, head: Head, heartbeat: Heartbeat) -> None:
    node.loop_lag_ms = heartbeat.loop_lag_ms
    for health in heartbeat.health:
        ranks.health_changed(state, node, health)
    for load in heartbeat.replicas:
        replica = state.replicas.get(load.replica)
        if replica is None or replica.epoch != load.epoch or not replica.holds_devices:
            state.fence("ReplicaLoad")
            continue
        replica.stall.told(node.node, load, heartbeat.uptime_ms)
        if replica.members[0].node == node.node:
            recovery.load_heard(state, replica, load, head.ack)


def gateway_said(state: ClusterState, event: GatewaySaid) -> None:
    link = _admitted(state, event)
    if link is None or not isinstance(link.owner, Gateway):
        return
    link.owner.silence_s = 0.0
    _gateway_frame(state, link.owner, event.body)


def _gateway_frame(state: ClusterState, gateway: Gateway, body: RouteUp) -> None:
    match body:
        case RouteBatch():
            for entry in body.entries:
                scheduler.route(state, gateway, entry)
        case EndBatch():
            for entry in body.entries:
                scheduler.end(state, entry)
        case Inventory():
            gateways.inventory(state, gateway, body)
        case GatewayHeartbeat():
            gateway.open_requests = body.open_requests
        case Locate():
            gateways.locate(state, gateway, body)
        case FirstTokens():
            for token in body.entries:
                failures.first_token(state, token)
        case GatewayHello() | Fenced():
            pass
        case _:
            assert_never(body)
