"""The leader's state for people and programs: plain rows that mirror StatusResponse of admin.proto field by field."""

from __future__ import annotations

from dataclasses import dataclass, replace

from controlplane.core.elastic import is_shrunk, shrunk_reason
from controlplane.core.entities import SERVING_PHASES, Deployment, LeaderPhase, Node, NodePhase, Replica
from controlplane.core.failure import Failure, FailurePhase
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import (
    Attempt,
    ClusterId,
    DeploymentId,
    Epoch,
    GatewayId,
    Incarnation,
    NodeId,
    ReplicaId,
    RequestId,
    Term,
)
from controlplane.runtime.messages.common import Member, ParallelDegrees, Reason, ReasonKind, ReplicaPhase, TimingSpec
from controlplane.runtime.messages.session import RankInfo
from controlplane.runtime.records import DeploymentRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderStatus:
    id: str
    pid: int
    address: str
    term: Term
    phase: LeaderPhase
    incarnation: Incarnation


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    id: NodeId
    host: str
    pid: int
    phase: NodePhase
    ranks: tuple[RankInfo, ...]
    serve_address: str
    incarnation: Incarnation
    silent_ms: int
    reason: Reason | None
    loop_lag_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    id: ReplicaId
    phase: ReplicaPhase
    epoch: Epoch
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    deployment: DeploymentId
    members: tuple[Member, ...]
    step_ms: float
    reason: Reason | None
    load_fraction: float
    load_stage: str
    numerics: str
    attention: str
    degrees: ParallelDegrees


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayStatus:
    id: GatewayId
    pid: int
    url: str
    open_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentStatus:
    id: DeploymentId
    model: str
    model_path: str
    replicas: int
    ready: int
    degrees: ParallelDegrees
    numerics: str
    reason: str
    spares: int
    spares_ready: int


FROZEN = (
    "the leader cannot use etcd: requests are served and replayed, but nobody is declared dead, nothing is placed, and "
    "no operator's change is taken"
)
UNWRITABLE = "etcd took no change from the leader last: nothing is placed, and no operator's change is taken"


@dataclass(frozen=True, slots=True, kw_only=True)
class FencedCount:
    frame: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusView:
    cluster: ClusterId
    leader: LeaderStatus
    nodes: tuple[NodeStatus, ...]
    replicas: tuple[ReplicaStatus, ...]
    gateways: tuple[GatewayStatus, ...]
    deployments: tuple[DeploymentStatus, ...]
    fenced: tuple[FencedCount, ...]
    timing: TimingSpec
    # What cannot be done now, and why.
    limited: Reason | None = None
    # Set by whoever answers.
    answered_by: str = ""
    answerer: Incarnation = Incarnation("")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    id: RequestId
    gateway: GatewayId
    attempt: Attempt
    phase: str
    replica: ReplicaId
    epoch: Epoch
    priority: int
    tenant: str
    prompt_tokens: int
    max_tokens: int
    age_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureStep:
    phase: FailurePhase
    after_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureStatus:
    age_ms: int
    replica: ReplicaId
    epoch: Epoch
    node: NodeId
    reason: Reason
    steps: tuple[FailureStep, ...]
    next_epoch: Epoch
    requests: int
    homeless: int
    silent: int
    suspects: tuple[RequestId, ...]
    gap_ms_max: int
    over: bool


def status_view(state: ClusterState, now: float) -> StatusView:
    """All of the cluster as the leader sees it at `now`, sorted by id."""
    return StatusView(
        cluster=state.cluster,
        leader=LeaderStatus(
            id=state.name,
            pid=state.pid,
            address=state.address,
            term=state.term,
            phase=state.phase,
            incarnation=state.incarnation,
        ),
        nodes=tuple(_node(node) for _, node in sorted(state.nodes.items())),
        replicas=tuple(_replica(state, replica) for _, replica in sorted(state.replicas.items())),
        gateways=tuple(
            GatewayStatus(id=name, pid=gateway.pid, url=gateway.url, open_requests=gateway.open_requests)
            for name, gateway in sorted(state.gateways.items())
            if gateway.link is not None
        ),
        deployments=tuple(_deployment(state, deployment) for _, deployment in sorted(state.deployments.items())),
        fenced=tuple(FencedCount(frame=frame, count=count) for frame, count in sorted(state.fenced.items())),
        timing=state.timings.to_spec(),
        limited=_limited(state),
    )


def _limited(state: ClusterState) -> Reason | None:
    if not state.frozen and not state.trouble:
        return None
    text = FROZEN if state.frozen else UNWRITABLE
    return Reason(kind=ReasonKind.STORE_UNAVAILABLE, text=f"{text} ({state.trouble})" if state.trouble else text)


def requests_view(state: ClusterState, now: float) -> tuple[RequestStatus, ...]:
    """Every request the leader knows of, oldest first."""
    rows = [
        RequestStatus(
            id=name,
            gateway=request.gateway,
            attempt=request.entry.attempt,
            phase="assigned" if request.permit else "queued",
            replica=request.permit.replica if request.permit else ReplicaId(""),
            epoch=request.permit.epoch if request.permit else Epoch(0),
            priority=request.entry.priority,
            tenant=request.entry.tenant,
            prompt_tokens=request.entry.prompt_tokens,
            max_tokens=request.entry.max_tokens,
            age_ms=round((now - request.arrived) * 1000) + request.entry.waited_ms,
        )
        for name, request in state.requests.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.age_ms, row.id)))


def _node(node: Node) -> NodeStatus:
    return NodeStatus(
        id=node.node,
        host=node.host,
        pid=node.pid,
        phase=node.phase,
        ranks=tuple(replace(rank, held=node.held.get(device)) for device, rank in sorted(node.ranks.items())),
        serve_address=node.serve_address,
        incarnation=node.incarnation,
        silent_ms=round((node.unreachable_s if node.link is None else node.silence_s) * 1000),
        reason=node.reason,
        loop_lag_ms=node.loop_lag_ms,
    )


def _replica(state: ClusterState, replica: Replica) -> ReplicaStatus:
    record = state.deployments[replica.deployment].record
    load = replica.load.heartbeat
    total = replica.capacity.total_blocks if replica.capacity else 0
    return ReplicaStatus(
        id=replica.replica,
        phase=replica.phase,
        epoch=replica.epoch,
        running=load.running if load else 0,
        waiting=load.waiting if load else 0,
        free_blocks=load.free_blocks if load else total if replica.phase in SERVING_PHASES else 0,
        total_blocks=total,
        deployment=replica.deployment,
        members=replica.members,
        step_ms=load.step_ms if load else 0.0,
        reason=_replica_reason(record, replica),
        load_fraction=replica.load_fraction,
        load_stage=replica.load_stage,
        numerics=replica.capacity.numerics if replica.capacity else "",
        attention=replica.capacity.attention if replica.capacity else "",
        degrees=(replica.spec or record.spec).degrees,
    )


def _replica_reason(record: DeploymentRecord, replica: Replica) -> Reason | None:
    """Why it does not serve, or serves with less than it should."""
    shrunk = replica.phase is ReplicaPhase.READY and is_shrunk(record, replica)
    return shrunk_reason(record, replica) if shrunk else replica.reason


def _deployment(state: ClusterState, deployment: Deployment) -> DeploymentStatus:
    record = deployment.record
    replicas = [replica for _, replica in sorted(deployment.replicas.items())]
    ready = sum(replica.phase is ReplicaPhase.READY for replica in replicas)
    reasons = [(replica.replica, _replica_reason(record, replica)) for replica in replicas]
    ailing = [f"{name}: {reason.text}" for name, reason in reasons if reason is not None]
    spares = [spare for node in state.nodes.values() for spare in node.spares.values()]
    return DeploymentStatus(
        id=record.deployment,
        model=record.model,
        model_path=record.spec.model_path,
        replicas=record.replicas,
        ready=ready,
        degrees=record.spec.degrees,
        numerics=record.spec.numerics,
        reason=ailing[0] if ailing else "",
        spares=record.spares,
        spares_ready=sum(spare.ready and spare.spec.deployment == record.deployment for spare in spares),
    )


def failures_view(state: ClusterState, now: float) -> tuple[FailureStatus, ...]:
    """This term's failures, oldest first."""
    return tuple(_failure(failure, now) for failure in state.failures.records)


def _failure(failure: Failure, now: float) -> FailureStatus:
    steps = sorted(failure.phases.items(), key=lambda item: item[1])
    return FailureStatus(
        age_ms=round((now - failure.noticed) * 1000),
        replica=failure.replica,
        epoch=failure.epoch,
        node=failure.node,
        reason=failure.reason,
        steps=tuple(FailureStep(phase=phase, after_ms=round((at - failure.noticed) * 1000)) for phase, at in steps),
        next_epoch=failure.next_epoch,
        requests=len(failure.lost),
        homeless=len(failure.homeless),
        silent=len(failure.silent),
        suspects=failure.suspects,
        gap_ms_max=failure.gap_ms_max,
        over=failure.over,
    )
