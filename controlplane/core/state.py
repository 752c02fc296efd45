"""All that the leading coordinator knows. Only `step` changes it; invariants.py says what must always hold."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from controlplane.core.entities import (
    Deployment,
    Gateway,
    LeaderPhase,
    Limits,
    Link,
    Node,
    Outbox,
    Replica,
    Request,
    is_session_live,
)
from controlplane.core.failure import FailureLog
from controlplane.core.invariants import check
from controlplane.core.ladder import Ladder
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
from controlplane.core.places import Places
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
from controlplane.runtime.messages.common import Reason, ReplicaPhase
from controlplane.runtime.messages.route import LeaderHeartbeat, RouteDown
from controlplane.runtime.messages.session import AttachDown
from controlplane.runtime.records import DeploymentRecord, PlacementRecord
from controlplane.runtime.timing import Timings

NO_NODE = NodeId("")
NO_REQUEST = RequestId("")


EPOCHS_A_TERM = 1_000_000
"""Epochs of a replica that the leader of a term has for itself. Each leader begins above those of all terms before its
own, so that no epoch comes twice, even if etcd was restored and nobody who knew of it is alive. Should nobody know even
of the term, so that it comes twice itself, its two leaders begin at places of their own in it."""

Placing = tuple[ReplicaId, Epoch]
"""A placement on its way to etcd."""

Applying = tuple[AskId, DeploymentRecord, bool]
"""A deployment on its way to etcd, who asked for it, and whether there was none of its name then."""

Deleting = tuple[AskId, DeploymentId]
"""A deployment on its way out of etcd, and who asked for that."""


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
    # For how long workers may still be alive that this leader does not know of, or takes for lost, and hold streams.
    unheard_s: float = 0.0
    # Where this leader's epochs begin within its term's.
    epoch_base: int = 0
    peers: frozenset[str] = frozenset()
    # Why etcd does not renew the leader's lease, or took no write of it last, as far as that is known.
    trouble: str = ""
    nodes: dict[NodeId, Node] = field(default_factory=dict[NodeId, Node])
    gateways: dict[GatewayId, Gateway] = field(default_factory=dict[GatewayId, Gateway])
    links: dict[ConnectionId, Link] = field(default_factory=dict[ConnectionId, Link])
    deployments: dict[DeploymentId, Deployment] = field(default_factory=dict[DeploymentId, Deployment])
    replicas: dict[ReplicaId, Replica] = field(default_factory=dict[ReplicaId, Replica])
    # Nodes whose ranks hold weights of a deployment, and perhaps some that did.
    holders: dict[DeploymentId, dict[NodeId, None]] = field(default_factory=dict[DeploymentId, dict[NodeId, None]])
    # Some node may have spares.
    spared: bool = False
    # Nodes that have yet to tell what they hold, and perhaps some that did.
    untold: dict[NodeId, None] = field(default_factory=dict[NodeId, None])
    # Nodes that drain, and perhaps some that did.
    draining: set[NodeId] = field(default_factory=set[NodeId])
    # An index of replicas.
    places: Places = field(default_factory=Places)
    requests: dict[RequestId, Request] = field(default_factory=dict[RequestId, Request])
    # For how long no gateway session has held the journals of these, and perhaps of some that ended or were resumed.
    orphans: dict[RequestId, float] = field(default_factory=dict[RequestId, float])
    # Highest epoch known of any replica, living or not.
    epochs: dict[ReplicaId, Epoch] = field(default_factory=dict[ReplicaId, Epoch])
    # Addresses that refused connects of a living process: for them the lease alone counts.
    refusal_lies: set[str] = field(default_factory=set[str])
    # When each node was lost soon after it came; a name outlives its incarnations.
    losses: dict[NodeId, deque[float]] = field(default_factory=dict[NodeId, deque[float]])
    failures: FailureLog = field(default_factory=FailureLog)
    # Refused frames by kind; those that a peer refused of ours begin with "peer:".
    fenced: Counter[str] = field(default_factory=Counter[str])
    placing: dict[WriteId, Placing] = field(default_factory=dict[WriteId, Placing])
    applying: dict[WriteId, Applying] = field(default_factory=dict[WriteId, Applying])
    deleting: dict[WriteId, Deleting] = field(default_factory=dict[WriteId, Deleting])
    # What etcd held when it was last read as a whole, until that is compared with what it is to hold.
    placements_read: Mapping[ReplicaId, PlacementRecord] | None = None
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
        rng = random.Random(rng_seed)
        return cls(
            term=term,
            name=name,
            incarnation=incarnation,
            cluster=cluster,
            timings=timings,
            limits=limits,
            rng=rng,
            address=address,
            pid=pid,
            grace_s=timings.leader_grace,
            # Before term 1 there was no cluster of this id.
            unheard_s=timings.resume_grace if term > 1 else 0.0,
            epoch_base=rng.randrange(EPOCHS_A_TERM // 2) if term > 1 else 0,
        )

    def check(self) -> None:
        """Assert every invariant. For tests: it looks at everything."""
        check(self)

    # ------------------------------------------------------------ small questions

    @property
    def frozen(self) -> bool:
        return self.phase is LeaderPhase.FROZEN

    def served_by(self, deployment: Deployment) -> Iterator[Replica]:
        """Replicas of `deployment` that may be given requests."""
        for replica in deployment.replicas.values():
            if self.serves(replica):
                yield replica

    def serves(self, replica: Replica) -> bool:
        """It may be given requests."""
        return replica.phase is ReplicaPhase.READY and self.driver(replica) is not None

    def weigh(self, replica: Replica) -> None:
        """Its load changed, or whether it serves: it has another place among its equals, once somebody asks."""
        deployment = self.deployments.get(replica.deployment)
        if deployment is not None:
            deployment.unweighed[replica.index] = None

    def ladder_of(self, deployment: Deployment) -> Ladder:
        """The deployment's replicas that serve, and perhaps some that did, by their load now."""
        for index in deployment.unweighed:
            replica = deployment.replicas.get(index)
            if replica is not None and self.serves(replica) and replica.capacity is not None:
                deployment.ladder.put(index, replica.load.sequences / replica.capacity.max_sequences)
            else:
                deployment.ladder.drop(index)
        deployment.unweighed.clear()
        return deployment.ladder

    def driver(self, replica: Replica) -> Node | None:
        """The node of rank 0, if all the replica's nodes have a live session."""
        driver: Node | None = None
        for name in replica.nodes:
            node = self.nodes.get(name)
            if node is None or not is_session_live(node):
                return None
            driver = driver or node
        return driver

    def has_journal(self, request: Request) -> bool:
        """A gateway's session holds it."""
        gateway = self.gateways.get(request.gateway)
        return gateway is not None and gateway.link is not None and gateway.incarnation == request.incarnation

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

    def beat_gateways(self) -> None:
        """Tell them whether what they know of this leader is all there is."""
        self.send_gateways(LeaderHeartbeat(frozen=self.frozen, workers_unheard=self.unheard_s > 0))

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
        """The replica changed its phase or its members, or is no more. Gateways will see its row at the end of this
        step."""
        if replica.replica in self.replicas:
            self.places.note(replica)
        else:
            self.places.forget(replica)
        self.weigh(replica)
        self.out.rows[replica.replica] = replica
