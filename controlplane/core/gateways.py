"""Sessions of gateways: their journals are the truth about requests, the replica table is their map."""

from __future__ import annotations

from controlplane.core import scheduler
from controlplane.core.entities import Gateway, Link, Node, NodePhase, Replica
from controlplane.core.messages import AdminAnswered, AskId, CancelAsked, ConnectionId
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import NodeId, RequestId
from controlplane.runtime.messages.common import Permit, Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import (
    CancelRequest,
    GatewayHello,
    GatewayWelcome,
    Inventory,
    JournalInfo,
    JournalPhase,
    Locate,
    Located,
    ReplicaClosed,
    ReplicaRow,
    ReplicaTable,
    WorkerRow,
)


def welcome(state: ClusterState, connection: ConnectionId, hello: GatewayHello) -> None:
    """Take the gateway's session: the full table at once, its Inventory to come."""
    gateway = state.gateways.get(hello.gateway)
    if gateway is None or gateway.incarnation != hello.incarnation:
        if gateway is not None and gateway.link is not None:
            _supersede(state, gateway.link, "another process of its name came")
            _orphan(state, gateway)
        gateway = Gateway(hello.gateway, hello.incarnation, hello.url, hello.pid, hello.host)
        state.gateways[hello.gateway] = gateway
        state.record("gateway_joined", details={"gateway": hello.gateway, "url": hello.url})
    elif gateway.link is not None:
        _supersede(state, gateway.link, "a newer session of the same process")
    gateway.link = state.links[connection] = Link(connection, gateway, state.mint_session())
    gateway.known = False
    gateway.listed.clear()
    gateway.silence_s = gateway.gone_s = 0.0
    session, timing = gateway.link.session, state.timings.to_spec()
    body = GatewayWelcome(term=state.term, session=session, timing=timing, leader=state.incarnation)
    state.send_gateway(gateway, body)
    rows = tuple(row_of(state, replica) for replica in state.replicas.values())
    workers = tuple(row for node in state.nodes.values() if not (row := worker_row(node)).gone)
    state.send_gateway(gateway, ReplicaTable(full=True, rows=rows, workers=workers))


def _supersede(state: ClusterState, link: Link, text: str) -> None:
    state.close_link(link, Reason(kind=ReasonKind.SUPERSEDED, text=text))


def broken(state: ClusterState, gateway: Gateway) -> None:
    """Its stream ended: it cannot be answered, so what it asked is dropped; it will ask again. What runs is kept."""
    gateway.link = None
    gateway.known = False
    state.record("gateway_disconnected", details={"gateway": gateway.gateway})
    for name, request in list(state.requests.items()):
        if request.gateway == gateway.gateway and request.permit is None:
            scheduler.forget(state, name)
    _orphan(state, gateway)


def _orphan(state: ClusterState, gateway: Gateway) -> None:
    """Its session is over: from now on nobody holds the journals of what runs for it."""
    for name, request in state.requests.items():
        if request.gateway == gateway.gateway:
            state.orphans.setdefault(name, 0.0)


def inventory(state: ClusterState, gateway: Gateway, chunk: Inventory) -> None:
    """All the gateway's open journals: what it does not list is over. Later ones are those that it takes over."""
    if gateway.known:
        if chunk.last:
            state.fence("Inventory")
            return
        for journal in chunk.journals:
            _take_journal(state, gateway, journal)
            state.record("request_resumed", request=journal.entry.request, details={"gateway": gateway.gateway})
        return
    for journal in chunk.journals:
        gateway.listed.add(journal.entry.request)
        _take_journal(state, gateway, journal)
    if not chunk.last:
        return
    gateway.known = True
    for name, request in list(state.requests.items()):
        mine = request.gateway == gateway.gateway and request.incarnation == gateway.incarnation
        if mine and name not in gateway.listed:
            scheduler.forget(state, name)
    gateway.listed.clear()


def _take_journal(state: ClusterState, gateway: Gateway, journal: JournalInfo) -> None:
    entry = journal.entry
    if journal.phase is JournalPhase.ROUTING:
        scheduler.route(state, gateway, entry)
        return
    replica = state.replicas.get(journal.replica)
    if journal.phase is not JournalPhase.DRAINING_CLIENT and not _may_run(replica, journal):
        _tell_closed(state, gateway, journal)
        return
    known = state.requests.get(entry.request)
    if known is not None:
        if known.entry.attempt > entry.attempt:
            return
        scheduler.forget(state, entry.request)
    permit = Permit(
        request=entry.request,
        attempt=entry.attempt,
        replica=journal.replica,
        epoch=journal.epoch,
        term=state.term,
        priority=entry.priority,
    )
    scheduler.admit(state, gateway, entry, permit)
    if replica is not None and replica.epoch == journal.epoch and journal.phase is not JournalPhase.DRAINING_CLIENT:
        replica.load.outstanding.add(entry.request)


def _may_run(replica: Replica | None, journal: JournalInfo) -> bool:
    return replica is not None and replica.holds_devices and replica.epoch == journal.epoch


def _tell_closed(state: ClusterState, gateway: Gateway, journal: JournalInfo) -> None:
    """The journal runs on an epoch that is over: its gateway missed the news."""
    text = f"epoch {journal.epoch} of {journal.replica} was over when the session began"
    reason = Reason(kind=ReasonKind.STALE_EPOCH, text=text)
    state.send_gateway(gateway, ReplicaClosed(replica=journal.replica, epoch=journal.epoch, reason=reason))


def locate(state: ClusterState, gateway: Gateway, asked: Locate) -> None:
    """Which node holds a request's shadow."""
    node = _node_of(state, asked.request)
    address = state.nodes[node].serve_address if node else ""
    state.send_gateway(gateway, Located(request=asked.request, node=node, serve_address=address))


def _node_of(state: ClusterState, request: RequestId) -> NodeId:
    known = state.requests.get(request)
    if known is not None and known.permit is not None:
        replica = state.replicas.get(known.permit.replica)
        if replica is not None and replica.epoch == known.permit.epoch and replica.members[0].node in state.nodes:
            return replica.members[0].node
    return next((node.node for node in state.nodes.values() if request in node.sequences), NodeId(""))


def cancel_asked(state: ClusterState, ask: AskId, asked: CancelAsked) -> None:
    """An operator's cancel goes to the request's gateway, which ends it in order with its body."""
    request = state.requests.get(asked.request)
    gateway = state.gateways.get(request.gateway) if request is not None else None
    if gateway is None or gateway.link is None:
        reason = Reason(kind=ReasonKind.UNKNOWN_ID, text=f"no request {asked.request}")
        state.emit(AdminAnswered(ask, reason))
        return
    reason = Reason(kind=ReasonKind.ADMIN, text="an operator cancelled it")
    state.send_gateway(gateway, CancelRequest(request=asked.request, reason=reason))
    state.record("request_cancelled", request=asked.request, reason=reason)
    state.emit(AdminAnswered(ask, None))


def row_of(state: ClusterState, replica: Replica) -> ReplicaRow:
    """The replica as gateways see it. One between two epochs is HELD: CLOSED would remove it from their table."""
    deployment = state.deployments.get(replica.deployment)
    driver = state.nodes.get(replica.members[0].node) if replica.members else None
    wanted = deployment.record.spec if deployment else None
    spec = (replica.spec if replica.holds_devices else wanted) or replica.spec or wanted
    outdated = spec is not None and wanted is not None and spec.model_path != wanted.model_path
    gone = replica.replica not in state.replicas
    phase = ReplicaPhase.HELD if replica.phase is ReplicaPhase.CLOSED and not gone else replica.phase
    return ReplicaRow(
        replica=replica.replica,
        epoch=replica.epoch,
        phase=phase,
        node=driver.node if driver else NodeId(""),
        serve_address=driver.serve_address if driver else "",
        deployment=replica.deployment,
        capacity=replica.capacity
        if replica.spec is None or spec is None or replica.spec.model_path == spec.model_path
        else None,
        model_path=spec.model_path if spec else "",
        model=deployment.names.get(spec.model_path, deployment.record.model) if deployment and spec else "",
        numerics=spec.numerics if spec else "",
        max_retries=deployment.record.max_retries if deployment else 0,
        outdated=outdated,
    )


def worker_row(node: Node) -> WorkerRow:
    """The node as gateways see it: somebody who may hold streams. One that an operator drained still does."""
    gone = node.phase is NodePhase.LOST or (node.phase is NodePhase.LEFT and node.link is None)
    return WorkerRow(node=node.node, serve_address=node.serve_address, gone=gone)


def tick(state: ClusterState, passed_s: float) -> None:
    """Heartbeats down; silence and absence up."""
    state.unheard_s = max(0.0, state.unheard_s - passed_s)
    state.beat_gateways()
    for gateway in list(state.gateways.values()):
        if gateway.link is not None:
            gateway.silence_s += passed_s
            if gateway.silence_s >= state.timings.failure_timeout:
                text = f"no frame for {gateway.silence_s:g} s"
                state.close_link(gateway.link, Reason(kind=ReasonKind.SESSION_SILENT, text=text))
                broken(state, gateway)
        else:
            gateway.gone_s += passed_s
            if gateway.gone_s >= state.timings.resume_grace:
                del state.gateways[gateway.gateway]
                state.record("gateway_forgotten", details={"gateway": gateway.gateway})
    for name in list(state.orphans):
        _count_orphan(state, name, passed_s)


def _count_orphan(state: ClusterState, name: RequestId, passed_s: float) -> None:
    """Nobody resumed it in time: its shadow is gone at the worker, too."""
    request = state.requests.get(name)
    if request is None or state.has_journal(request):
        del state.orphans[name]
        return
    state.orphans[name] += passed_s
    if state.orphans[name] >= state.timings.resume_grace:
        del state.orphans[name]
        scheduler.forget(state, name)
