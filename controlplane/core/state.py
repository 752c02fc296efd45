"""All that the leading coordinator knows. Only `step` changes it; invariants.py says what must always hold.

Times of waiting are counted in ticks that the judge itself ran (PROTOCOL H10), in seconds: `*_s` fields grow by at most
two heartbeat intervals a tick and not at all in a late one.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from controlplane.core.fair_queue import FairQueue
from controlplane.core.load import Load
from controlplane.core.messages import (
    AskId,
    CloseConnection,
    ConnectionId,
    Effect,
    Event,
    Recorded,
    SendGateway,
    SendWorker,
    WriteId,
)
from controlplane.runtime.ids import (
    ClusterId,
    DeploymentId,
    Epoch,
    GatewayId,
    Incarnation,
    NodeId,
    ReplicaId,
    RequestId,
    SessionId,
    Term,
)
from controlplane.runtime.messages.common import Capacity, Device, Member, Permit, Reason, ReplicaPhase, ReplicaSpec
from controlplane.runtime.messages.route import Routed, RouteDown, RouteEntry, RouteRefused
from controlplane.runtime.messages.session import AttachDown, RankInfo, ReplicaInfo, SequenceInfo
from controlplane.runtime.records import DeploymentRecord
from controlplane.runtime.timing import Timings

NO_NODE = NodeId("")
NO_REQUEST = RequestId("")


class LeaderPhase(IntEnum):
    """Values of LeaderPhase in admin.proto."""

    CANDIDATE = 1
    # Routes to snapshotted replicas; absence proves nothing yet.
    REBUILDING = 2
    LEADING = 3
    # Cannot reach etcd: routes and closes in memory; neither revokes nor places.
    FROZEN = 4


class NodePhase(IntEnum):
    """Values of NodePhase in admin.proto."""

    # In etcd, no session yet.
    KNOWN = 1
    LIVE = 2
    UNREACHABLE = 3
    DRAINING = 4
    LEFT = 5
    LOST = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of what the coordinator keeps, each with its overflow rule."""

    # New requests that wait in all queues together; beyond it they are refused as OVERLOADED. Replays pass.
    queued_requests_max: int = 4096
    # Sequences a replica is given, as a multiple of its batch; beyond it requests wait here, where order is global.
    window_batches: int = 2
    # Requests assigned in one optimised batch; more take several batches.
    assignment_batch_max: int = 32
    # Replicas considered for one batch, least loaded first; the others wait for a later one.
    assignment_replicas_max: int = 16
    # Failed attempts to bring a replica up within timings.regroup_window after which it is DEGRADED.
    regroup_failures_max: int = 3


@dataclass(slots=True)
class Link:
    """One stream of a peer."""

    connection: ConnectionId
    owner: Node | Gateway
    session: SessionId
    # Frames sent on it, as the shell counts them in heads.
    sent: int = 0


@dataclass(slots=True)
class Drain:
    """Leave taken in order: running work ends until `left_s` is over, then it moves."""

    reason: Reason
    left_s: float
    moved: bool = False
    # The daemon goes away afterwards.
    leaving: bool = False


@dataclass(slots=True)
class SnapshotChunks:
    """A WorkerSnapshot as far as it came."""

    ranks: list[RankInfo] = field(default_factory=list[RankInfo])
    replicas: list[ReplicaInfo] = field(default_factory=list[ReplicaInfo])
    sequences: list[SequenceInfo] = field(default_factory=list[SequenceInfo])


@dataclass(slots=True)
class Node:
    """A worker daemon: one incarnation a name."""

    node: NodeId
    incarnation: Incarnation
    phase: NodePhase
    serve_address: str
    host: str
    pid: int
    lease_id: int
    # Its key stands in etcd.
    leased: bool
    devices: tuple[Device, ...] = ()
    link: Link | None = None
    # This session's Snapshot is complete.
    known: bool = False
    # A session of this incarnation worked in this term: a refused connect then proves something.
    worked: bool = False
    chunks: SnapshotChunks = field(default_factory=SnapshotChunks)
    ranks: dict[str, RankInfo] = field(default_factory=dict[str, RankInfo])
    # Requests whose sequences it reported with its Snapshot.
    sequences: dict[RequestId, SequenceInfo] = field(default_factory=dict[RequestId, SequenceInfo])
    sick: dict[str, Reason] = field(default_factory=dict[str, Reason])
    silence_s: float = 0.0
    unreachable_s: float = 0.0
    probing: bool = False
    # Two connects were refused after its session broke.
    proven: bool = False
    revoked: bool = False
    drain: Drain | None = None
    loop_lag_ms: int = 0
    reason: Reason | None = None

    @property
    def placeable(self) -> bool:
        """New ranks may be placed here."""
        return self.phase is NodePhase.LIVE and self.known


@dataclass(slots=True)
class Gateway:
    gateway: GatewayId
    incarnation: Incarnation
    url: str
    pid: int
    host: str
    link: Link | None = None
    # This session's Inventory is complete.
    known: bool = False
    # Requests of the Inventory as far as it came.
    listed: set[RequestId] = field(default_factory=set[RequestId])
    silence_s: float = 0.0
    gone_s: float = 0.0
    open_requests: int = 0


FORMING_PHASES = frozenset({ReplicaPhase.PREPARING, ReplicaPhase.FORMING, ReplicaPhase.LOADING})
SERVING_PHASES = frozenset({ReplicaPhase.READY, ReplicaPhase.DRAINING})
PLACED_PHASES = FORMING_PHASES | SERVING_PHASES | {ReplicaPhase.PLANNED}


@dataclass(slots=True)
class Replica:
    """A replica through all its epochs."""

    replica: ReplicaId
    deployment: DeploymentId
    index: int
    phase: ReplicaPhase
    epoch: Epoch
    # Epoch that etcd is known to hold.
    stored: Epoch
    # Members of the epoch; of the last one while it has no place.
    members: tuple[Member, ...] = ()
    # What the epoch was placed with; None for one read from etcd.
    spec: ReplicaSpec | None = None
    # A placement read from etcd, until its workers tell what became of it: its devices are not free.
    adopting: bool = False
    # Nodes that answered the current stage, or reported the adopted epoch.
    acked: set[NodeId] = field(default_factory=set[NodeId])
    nonce: str = ""
    rendezvous: str = ""
    # Time in the current stage; starts again with each load progress.
    stage_s: float = 0.0
    load_stage: str = ""
    load_fraction: float = 0.0
    capacity: Capacity | None = None
    load: Load = field(default_factory=Load)
    # How long it has had work without its progress counter moving.
    stalled_s: float = 0.0
    served_s: float = 0.0
    drain: Drain | None = None
    # It goes for good once closed.
    retiring: bool = False
    failures: deque[float] = field(default_factory=deque[float])
    retry_s: float = 0.0
    # Since it has no place.
    homeless_s: float = 0.0
    reason: Reason | None = None

    @property
    def nodes(self) -> list[NodeId]:
        """Its nodes, rank 0's first."""
        return list(dict.fromkeys(member.node for member in self.members))

    @property
    def holds_devices(self) -> bool:
        return self.adopting or self.phase in PLACED_PHASES


@dataclass(slots=True)
class Deployment:
    record: DeploymentRecord
    replicas: dict[int, Replica] = field(default_factory=dict[int, Replica])
    queue: FairQueue = field(default_factory=FairQueue)
    removed: bool = False


@dataclass(slots=True)
class Request:
    """An attempt of a request, queued or assigned."""

    entry: RouteEntry
    gateway: GatewayId
    # Incarnation whose journal it is.
    incarnation: Incarnation
    arrived: float
    deadline: float | None
    # None while it waits.
    permit: Permit | None = None
    # How long no gateway session held its journal.
    orphan_s: float = 0.0


@dataclass(slots=True)
class Outbox:
    """Batched frames of one step: sent at its end."""

    effects: list[Effect] = field(default_factory=list[Effect])
    routed: dict[ConnectionId, list[Routed]] = field(default_factory=dict[ConnectionId, list[Routed]])
    refused: dict[ConnectionId, list[RouteRefused]] = field(default_factory=dict[ConnectionId, list[RouteRefused]])
    assigned: dict[ConnectionId, list[Permit]] = field(default_factory=dict[ConnectionId, list[Permit]])
    # Replicas whose row in the gateways' table changed.
    rows: dict[ReplicaId, Replica] = field(default_factory=dict[ReplicaId, Replica])


Placing = tuple[ReplicaId, Epoch]
"""A placement on its way to etcd."""

Applying = tuple[AskId, DeploymentRecord]
"""A deployment on its way to etcd, and who asked for it."""


@dataclass(slots=True)
class ClusterState:
    """One leader's term. Made by `new`; the first event it understands is StoreLoaded."""

    term: Term
    name: str
    incarnation: Incarnation
    cluster: ClusterId
    timings: Timings
    limits: Limits
    rng: random.Random
    address: str = ""
    pid: int = 0
    phase: LeaderPhase = LeaderPhase.REBUILDING
    loaded: bool = False
    # Stepped down: nothing is done any more.
    over: bool = False
    # Events that came before StoreLoaded.
    early: list[Event] = field(default_factory=list[Event])
    now: float = 0.0
    ticked: float | None = None
    grace_s: float = 0.0
    peers: frozenset[str] = frozenset()
    nodes: dict[NodeId, Node] = field(default_factory=dict[NodeId, Node])
    gateways: dict[GatewayId, Gateway] = field(default_factory=dict[GatewayId, Gateway])
    links: dict[ConnectionId, Link] = field(default_factory=dict[ConnectionId, Link])
    deployments: dict[DeploymentId, Deployment] = field(default_factory=dict[DeploymentId, Deployment])
    replicas: dict[ReplicaId, Replica] = field(default_factory=dict[ReplicaId, Replica])
    requests: dict[RequestId, Request] = field(default_factory=dict[RequestId, Request])
    # Highest epoch known of any replica, living or not.
    epochs: dict[ReplicaId, Epoch] = field(default_factory=dict[ReplicaId, Epoch])
    # Addresses that refused connects of a living process: for them the lease alone counts.
    refusal_lies: set[str] = field(default_factory=set[str])
    # Refused frames by kind; those that a peer refused of ours begin with "peer:".
    fenced: Counter[str] = field(default_factory=Counter[str])
    placing: dict[WriteId, Placing] = field(default_factory=dict[WriteId, Placing])
    applying: dict[WriteId, Applying] = field(default_factory=dict[WriteId, Applying])
    sessions: int = 0
    writes: int = 0
    # Something changed that may let a replica be placed, or a request be routed.
    replan: bool = False
    reroute: set[DeploymentId] = field(default_factory=set[DeploymentId])
    out: Outbox = field(default_factory=Outbox)

    @classmethod
    def new(
        cls,
        *,
        term: Term,
        name: str,
        incarnation: Incarnation,
        cluster: ClusterId,
        timings: Timings,
        limits: Limits,
        rng_seed: int,
        address: str = "",
        pid: int = 0,
    ) -> ClusterState:
        """State of a leader just elected."""
        return cls(
            term=term,
            name=name,
            incarnation=incarnation,
            cluster=cluster,
            timings=timings,
            limits=limits,
            rng=random.Random(rng_seed),
            address=address,
            pid=pid,
            grace_s=timings.leader_grace,
        )

    def check(self) -> None:
        """Assert every invariant. For tests: it looks at everything."""
        from controlplane.core.invariants import check  # it looks at the types defined here

        check(self)

    # ------------------------------------------------------------ small questions

    @property
    def frozen(self) -> bool:
        return self.phase is LeaderPhase.FROZEN

    def served_by(self, deployment: Deployment) -> Iterator[Replica]:
        """Replicas of `deployment` that may be given requests."""
        for replica in deployment.replicas.values():
            if replica.phase is ReplicaPhase.READY and self.driver(replica) is not None:
                yield replica

    def driver(self, replica: Replica) -> Node | None:
        """The node of rank 0, if all the replica's nodes have a live session."""
        nodes = [self.nodes.get(name) for name in replica.nodes]
        if not nodes or any(node is None or not is_session_live(node) for node in nodes):
            return None
        return nodes[0]

    def mint_session(self) -> SessionId:
        self.sessions += 1
        return SessionId(self.sessions)

    def mint_write(self) -> WriteId:
        self.writes += 1
        return WriteId(self.writes)

    # ------------------------------------------------------------ effects

    def emit(self, effect: Effect) -> None:
        self.out.effects.append(effect)

    def record(
        self,
        name: str,
        *,
        node: NodeId = NO_NODE,
        replica: Replica | None = None,
        request: RequestId = NO_REQUEST,
        reason: Reason | None = None,
        details: Mapping[str, str] | None = None,
    ) -> None:
        """Say what happened; `name` is noun_verb_past."""
        self.emit(
            Recorded(
                name,
                node=node,
                replica=replica.replica if replica else ReplicaId(""),
                epoch=replica.epoch if replica else Epoch(0),
                request=request,
                reason=reason,
                details=details or {},
            )
        )

    def send_worker(self, node: Node, body: AttachDown) -> int:
        """The frame's number in its session; 0 if the node has no session to send it on."""
        if node.link is None:
            return 0
        node.link.sent += 1
        self.emit(SendWorker(node.link.connection, body))
        return node.link.sent

    def send_gateway(self, gateway: Gateway, body: RouteDown) -> None:
        if gateway.link is not None:
            gateway.link.sent += 1
            self.emit(SendGateway(gateway.link.connection, body))

    def send_gateways(self, body: RouteDown) -> None:
        for gateway in self.gateways.values():
            self.send_gateway(gateway, body)

    def close_link(self, link: Link, reason: Reason) -> None:
        """End a stream from our side; no WorkerClosed or GatewayClosed is waited for."""
        self.links.pop(link.connection, None)
        if link.owner.link is link:
            link.owner.link = None
        self.emit(CloseConnection(link.connection, reason))

    def fence(self, kind: str) -> None:
        """Count a refused frame."""
        self.fenced[kind] += 1

    def row_changed(self, replica: Replica) -> None:
        """Gateways will see the replica's row at the end of this step."""
        self.out.rows[replica.replica] = replica


def is_session_live(node: Node) -> bool:
    """The node speaks to us: its Snapshot came and it is not silent."""
    return node.link is not None and node.known and node.phase in (NodePhase.LIVE, NodePhase.DRAINING, NodePhase.LEFT)
