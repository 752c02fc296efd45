"""What the coordinator keeps of its peers, replicas, deployments and requests. Owned by ClusterState (state.py).

Times of waiting are counted in ticks that the judge itself ran (PROTOCOL H10), in seconds: `*_s` fields grow by at most
two heartbeat intervals a tick and not at all in a late one.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from enum import IntEnum

from controlplane.core.fair_queue import FairQueue
from controlplane.core.ladder import Ladder
from controlplane.core.load import Load
from controlplane.core.messages import ConnectionId, Effect
from controlplane.core.stall import Stall
from controlplane.runtime.ids import (
    DeploymentId,
    Epoch,
    GatewayId,
    Incarnation,
    NodeId,
    ReplicaId,
    RequestId,
    SessionId,
)
from controlplane.runtime.messages.common import (
    Capacity,
    Device,
    Member,
    Permit,
    Reason,
    ReasonKind,
    ReplicaPhase,
    ReplicaSpec,
)
from controlplane.runtime.messages.route import Routed, RouteEntry, RouteRefused
from controlplane.runtime.messages.session import RankInfo, ReplicaInfo, SequenceInfo
from controlplane.runtime.messages.weights import HeldWeights
from controlplane.runtime.records import DeploymentRecord


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
    # Failed attempts to bring a replica up within timings.regroup_window after which it is DEGRADED or FAILED.
    regroup_failures_max: int = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that went wrong, at monotonic time `at`."""

    at: float
    kind: ReasonKind


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
    """Leave taken in order: running work ends or moves, request by request, until `left_s` is over; then the rest
    moves."""

    reason: Reason
    left_s: float
    # How long it was to last, and the requests that ran when it began.
    window_s: float = 0.0
    requests: int = 0
    # All were told to move.
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
class Spare:
    """A free device that keeps a shard ready: that of rank `rank` of a replica of `spec`."""

    spec: ReplicaSpec
    rank: int
    # Whose loss it covers.
    reason: Reason
    # In this session.
    told: bool = False
    # It said that it holds the shard.
    ready: bool = False
    # Until it is told again.
    retry_s: float = 0.0


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
    # Its key stands in etcd, as far as we know.
    leased: bool
    # That was seen; until then a newcomer is believed.
    registered: bool = False
    devices: tuple[Device, ...] = ()
    link: Link | None = None
    # This session's Snapshot is complete.
    known: bool = False
    # A session of this incarnation worked in this term: a refused connect then proves something.
    worked: bool = False
    chunks: SnapshotChunks = field(default_factory=SnapshotChunks)
    ranks: dict[str, RankInfo] = field(default_factory=dict[str, RankInfo])
    # What a device's rank process holds of a model, as its daemon says.
    held: dict[str, HeldWeights] = field(default_factory=dict[str, HeldWeights])
    # Free devices that keep a shard ready.
    spares: dict[str, Spare] = field(default_factory=dict[str, Spare])
    # Preloads that failed on a device in a row.
    failed_preloads: Counter[str] = field(default_factory=Counter[str])
    # Requests whose sequences it reported with its Snapshot.
    sequences: dict[RequestId, SequenceInfo] = field(default_factory=dict[RequestId, SequenceInfo])
    sick: dict[str, Reason] = field(default_factory=dict[str, Reason])
    silence_s: float = 0.0
    unreachable_s: float = 0.0
    # When it was found unreachable; None while it is not.
    noticed: float | None = None
    probing: bool = False
    # Probes under way that an older break of its session began: their outcome says nothing.
    void_probes: int = 0
    # Two connects were refused after its session broke.
    proven: bool = False
    revoked: bool = False
    drain: Drain | None = None
    # When this incarnation's first session of the term began to count.
    joined_at: float = 0.0
    # Lost again and again: for so long it takes no new ranks.
    shunned_s: float = 0.0
    loop_lag_ms: int = 0
    reason: Reason | None = None

    @property
    def address(self) -> str:
        """Where others reach it, without a port. Its ranks meet there: what a machine calls itself (`host`) need not be
        known elsewhere, and is often a name for its loopback."""
        return self.serve_address.rpartition(":")[0].strip("[]")

    @property
    def untold(self) -> bool:
        """It has yet to tell what it holds."""
        return self.phase is NodePhase.KNOWN or (self.link is not None and not self.known)

    @property
    def placeable(self) -> bool:
        """New ranks may be placed here."""
        return self.phase is NodePhase.LIVE and self.known and self.shunned_s <= 0


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
GIVEN_UP = frozenset({ReplicaPhase.DEGRADED, ReplicaPhase.FAILED})
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
    # The present epoch could not be written, and nobody was told of it: the next attempt takes it again.
    unheard: bool = False
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
    # How long it has had work and not moved.
    stall: Stall = field(default_factory=Stall)
    # How long its steps have taken several times its equals'.
    slow_s: float = 0.0
    served_s: float = 0.0
    drain: Drain | None = None
    # It goes for good once closed.
    retiring: bool = False
    failures: deque[Fault] = field(default_factory=deque[Fault])
    retry_s: float = 0.0
    # Since it has no place.
    homeless_s: float = 0.0
    # How long it has been shrunk while its full size had a place.
    roomy_s: float = 0.0
    # Ranks that were too few: they ran out of memory while they came up.
    oom_ranks: int = 0
    reason: Reason | None = None
    # The members that `_nodes` was made from: it is asked for all the time.
    _nodes_of: tuple[Member, ...] = ()
    _nodes: tuple[NodeId, ...] = ()

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Its nodes, rank 0's first."""
        if self._nodes_of is not self.members:
            self._nodes_of = self.members
            self._nodes = tuple(dict.fromkeys(member.node for member in self.members))
        return self._nodes

    @property
    def holds_devices(self) -> bool:
        return self.adopting or self.phase in PLACED_PHASES


@dataclass(slots=True)
class Deployment:
    record: DeploymentRecord
    replicas: dict[int, Replica] = field(default_factory=dict[int, Replica])
    # It has the replicas it is to have, all of its spec; False: look again.
    settled: bool = False
    # What the models are called that it asked for before, by path: replicas that still run them keep the name.
    names: dict[str, str] = field(default_factory=dict[str, str])
    # What its spares were chosen from.
    covered: object = None
    queue: FairQueue = field(default_factory=FairQueue)
    # Those that serve, and perhaps some that did, by their load; but for those that are to be weighed again.
    ladder: Ladder = field(default_factory=Ladder)
    unweighed: dict[int, None] = field(default_factory=dict[int, None])
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


@dataclass(slots=True)
class Outbox:
    """Batched frames of one step: sent at its end."""

    effects: list[Effect] = field(default_factory=list[Effect])
    routed: dict[ConnectionId, list[Routed]] = field(default_factory=dict[ConnectionId, list[Routed]])
    refused: dict[ConnectionId, list[RouteRefused]] = field(default_factory=dict[ConnectionId, list[RouteRefused]])
    assigned: dict[ConnectionId, list[Permit]] = field(default_factory=dict[ConnectionId, list[Permit]])
    # Replays routed, by the replica that takes them.
    replayed: Counter[ReplicaId] = field(default_factory=Counter[ReplicaId])
    # Replicas whose row in the gateways' table changed.
    rows: dict[ReplicaId, Replica] = field(default_factory=dict[ReplicaId, Replica])
    # Workers that came or went.
    workers: dict[NodeId, Node] = field(default_factory=dict[NodeId, Node])


def is_session_live(node: Node) -> bool:
    """The node speaks to us: its Snapshot came and it is not silent."""
    return node.link is not None and node.known and node.phase in (NodePhase.LIVE, NodePhase.DRAINING, NodePhase.LEFT)
