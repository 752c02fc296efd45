"""What goes into the coordinator's core and what comes out: `step(state, event, now) -> effects`.

Protocol frames are those of controlplane.runtime.messages; here stand the events and effects of the coordinator
alone. Every effect that can fail ends in an event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NewType

from controlplane.runtime.ids import DeploymentId, Epoch, Incarnation, NodeId, ReplicaId, RequestId, Term
from controlplane.runtime.messages.common import Head, Reason
from controlplane.runtime.messages.route import GatewayHello, RouteDown, RouteUp
from controlplane.runtime.messages.session import AttachDown, AttachUp, WorkerHello
from controlplane.runtime.records import DeploymentRecord, NodeRecord, PlacementRecord

ConnectionId = NewType("ConnectionId", int)
"""One gRPC stream, as the shell numbers them; never reused in a process."""

WriteId = NewType("WriteId", int)
AskId = NewType("AskId", int)

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class StoreLoaded:
    """The whole of etcd's state: first event of a term, and again whenever the watch had to start over. `restored`: the
    store's revision went back, so absence proves nothing until grace is over."""

    nodes: Mapping[NodeId, NodeRecord]
    deployments: Mapping[DeploymentId, DeploymentRecord]
    placements: Mapping[ReplicaId, PlacementRecord]
    # Names of the other control-plane processes that hold a lease.
    peers: frozenset[str]
    restored: bool = False
    # Names of deployments that an operator deleted: no start's own deployment is to bring them back.
    deleted: frozenset[DeploymentId] = frozenset()


@dataclass(frozen=True, slots=True)
class NodeKeyChanged:
    """A node's key was put, or is gone (record None): its lease expired or was revoked."""

    node: NodeId
    record: NodeRecord | None


@dataclass(frozen=True, slots=True)
class DeploymentChanged:
    deployment: DeploymentId
    record: DeploymentRecord | None


@dataclass(frozen=True, slots=True)
class PeersChanged:
    peers: frozenset[str]


@dataclass(frozen=True, slots=True)
class LeaseMuted:
    """The local lease deadline passed and etcd did not renew the lease: frozen from now on."""

    # Why it did not, as far as that is known.
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class LeaseHeard:
    """etcd renewed the leader's lease after a mute."""


@dataclass(frozen=True, slots=True)
class WriteDone:
    """Outcome of WritePlacement, DeletePlacement, WriteDeployment or DeleteDeployment.

    Not ok: etcd is away (reason STORE_UNAVAILABLE) or the guard failed (the shell steps down by itself then).
    """

    write: WriteId
    ok: bool
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class RevokeDone:
    node: NodeId
    incarnation: Incarnation
    ok: bool


@dataclass(frozen=True, slots=True)
class ProbeDone:
    """Two raw TCP connects were made; `refused` only if both were refused."""

    node: NodeId
    incarnation: Incarnation
    refused: bool


@dataclass(frozen=True, slots=True)
class WorkerOpened:
    connection: ConnectionId
    hello: WorkerHello


@dataclass(frozen=True, slots=True)
class WorkerSaid:
    connection: ConnectionId
    head: Head
    body: AttachUp


@dataclass(frozen=True, slots=True)
class WorkerClosed:
    connection: ConnectionId


@dataclass(frozen=True, slots=True)
class GatewayOpened:
    connection: ConnectionId
    hello: GatewayHello


@dataclass(frozen=True, slots=True)
class GatewaySaid:
    connection: ConnectionId
    head: Head
    body: RouteUp


@dataclass(frozen=True, slots=True)
class GatewayClosed:
    connection: ConnectionId


@dataclass(frozen=True, slots=True)
class DrainAsked:
    node: NodeId
    # 0: the default.
    deadline_ms: int
    # Exit once drained.
    exit: bool = False


@dataclass(frozen=True, slots=True)
class UndrainAsked:
    node: NodeId


@dataclass(frozen=True, slots=True)
class CancelAsked:
    request: RequestId


@dataclass(frozen=True, slots=True)
class ApplyAsked:
    record: DeploymentRecord


@dataclass(frozen=True, slots=True)
class ScaleAsked:
    deployment: DeploymentId
    replicas: int


@dataclass(frozen=True, slots=True)
class DeleteAsked:
    deployment: DeploymentId


Wish = DrainAsked | UndrainAsked | CancelAsked | ApplyAsked | ScaleAsked | DeleteAsked


@dataclass(frozen=True, slots=True)
class AdminAsked:
    """Answered by exactly one AdminAnswered of the same id."""

    ask: AskId
    body: Wish


@dataclass(frozen=True, slots=True)
class Tick:
    """Comes every heartbeat interval, after all input that was there was handed in."""


Event = (
    StoreLoaded
    | NodeKeyChanged
    | DeploymentChanged
    | PeersChanged
    | LeaseMuted
    | LeaseHeard
    | WriteDone
    | RevokeDone
    | ProbeDone
    | WorkerOpened
    | WorkerSaid
    | WorkerClosed
    | GatewayOpened
    | GatewaySaid
    | GatewayClosed
    | AdminAsked
    | Tick
)

# ---------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class SendWorker:
    """The shell adds the head: term, the connection's session, seq, ack.

    seq counts the SendWorkers of a connection from 1, Welcome included; the core counts alike, so that a heartbeat's
    ack tells it which assignments the heartbeat knows of.
    """

    connection: ConnectionId
    body: AttachDown


@dataclass(frozen=True, slots=True)
class SendGateway:
    connection: ConnectionId
    body: RouteDown


@dataclass(frozen=True, slots=True)
class CloseConnection:
    """End the stream after what was sent before."""

    connection: ConnectionId
    reason: Reason


@dataclass(frozen=True, slots=True)
class Probe:
    """Answered by ProbeDone."""

    node: NodeId
    incarnation: Incarnation
    address: str


@dataclass(frozen=True, slots=True)
class RevokeLease:
    """Revoke exactly this lease. Answered by RevokeDone; the key's end comes as NodeKeyChanged too."""

    node: NodeId
    incarnation: Incarnation
    lease_id: int


@dataclass(frozen=True, slots=True)
class WritePlacement:
    """Guarded by the leader key's value. Answered by WriteDone."""

    write: WriteId
    record: PlacementRecord


@dataclass(frozen=True, slots=True)
class DeletePlacement:
    write: WriteId
    replica: ReplicaId


@dataclass(frozen=True, slots=True)
class WriteDeployment:
    write: WriteId
    record: DeploymentRecord


@dataclass(frozen=True, slots=True)
class DeleteDeployment:
    write: WriteId
    deployment: DeploymentId


@dataclass(frozen=True, slots=True)
class StepDown:
    """Give up leadership; stand again only after `pause_s` seconds."""

    reason: Reason
    pause_s: float
    # Highest term met; the next election must go above it.
    highest_term: Term


@dataclass(frozen=True, slots=True)
class AdminAnswered:
    """`error` is None when the ask was done."""

    ask: AskId
    error: Reason | None
    created: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line of what happened, when and why: for the event log, `perdure ctl events`, and metrics."""

    name: str
    node: NodeId = NodeId("")
    replica: ReplicaId = ReplicaId("")
    epoch: Epoch = Epoch(0)
    request: RequestId = RequestId("")
    reason: Reason | None = None
    details: Mapping[str, str] = field(default_factory=dict[str, str])


Effect = (
    SendWorker
    | SendGateway
    | CloseConnection
    | Probe
    | RevokeLease
    | WritePlacement
    | DeletePlacement
    | WriteDeployment
    | DeleteDeployment
    | StepDown
    | AdminAnswered
    | Recorded
)
