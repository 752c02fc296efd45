"""Frames of a gateway's session with the leader (Route).

Mirrors protos/perdure/v1/route.proto field by field; wire.py checks that at import.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from controlplane.runtime.ids import (
    NO_ATTEMPT,
    Attempt,
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
from controlplane.runtime.messages.common import Capacity, Permit, Reason, ReplicaPhase, TimingSpec
from controlplane.runtime.messages.session import Fenced, SessionRefused


class JournalPhase(IntEnum):
    ROUTING = 1
    OPENING = 2
    RUNNING = 3
    SYNCING = 4
    DRAINING_CLIENT = 5


class RouteCause(IntEnum):
    NEW = 1
    LOST = 2
    UNREACHABLE = 3
    PLANNED = 4


class Outcome(IntEnum):
    FINISHED = 1
    CANCELLED = 2
    FAILED = 3


class RouteCode(IntEnum):
    # Retry after retry_ms.
    OVERLOADED = 1
    NO_REPLICA = 2
    # Final.
    UNKNOWN_DEPLOYMENT = 3
    TOO_LONG = 4
    DEADLINE = 5
    POISON = 6
    DEPLOYMENT_FAILED = 7
    # Ask again under a higher one: another gateway had raised it before the stream was resumed.
    STALE_ATTEMPT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayHello:
    cluster: ClusterId
    gateway: GatewayId
    incarnation: Incarnation
    # Base URL of its HTTP API, for people.
    url: str
    highest_term_seen: Term
    pid: int
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayHeartbeat:
    open_requests: int
    journal_tokens: int
    loop_lag_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All open journals, in chunks of at most 1 MiB, right after Welcome. Once that is complete, a chunk that is not
    the last one adds a journal that the gateway took over from another."""

    journals: tuple[JournalInfo, ...] = ()
    last: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalInfo:
    """A journal in ROUTING asks again by being here; its entry is complete for that."""

    phase: JournalPhase
    # Where it runs, unless phase is ROUTING.
    replica: ReplicaId = ReplicaId("")
    epoch: Epoch = Epoch(0)
    entry: RouteEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaEpoch:
    replica: ReplicaId
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteEntry:
    request: RequestId
    attempt: Attempt
    deployment: DeploymentId
    cause: RouteCause = RouteCause.NEW
    prompt_tokens: int
    delivered_tokens: int = 0
    max_tokens: int
    n: int = 1
    priority: int = 0
    tenant: str = ""
    waited_ms: int = 0
    # Budget left until the request's deadline; 0: none.
    remaining_ms: int = 0
    # Chained block hashes of the prompt, first block first, at most 256. A hint.
    prefix_hashes: tuple[int, ...] = ()
    exclude: tuple[ReplicaEpoch, ...] = ()
    # How often it was in a step that killed its engine.
    crashes: int = 0
    # The model that its prompt was tokenised for: another one does not go on with it. Empty: any.
    model_path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteBatch:
    entries: tuple[RouteEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EndEntry:
    request: RequestId
    attempt: Attempt
    outcome: Outcome
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EndBatch:
    entries: tuple[EndEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Locate:
    request: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """A lost request goes on: the first token of its new attempt came."""

    request: RequestId
    attempt: Attempt
    # Since the last token of the attempt before, or since the loss where it gave none.
    gap_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokens:
    entries: tuple[FirstToken, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayWelcome:
    term: Term
    session: SessionId
    timing: TimingSpec
    # The process that leads. A term that two of them lead, after etcd was restored, is good for nobody.
    leader: Incarnation = Incarnation("")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderHeartbeat:
    # The leader cannot reach etcd: it routes, but neither judges nor places.
    frozen: bool = False
    # Workers may be alive that its table lacks, and hold streams: within the time that streams are kept it was elected,
    # or a node's lease ran out.
    workers_unheard: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRow:
    replica: ReplicaId
    epoch: Epoch
    phase: ReplicaPhase
    node: NodeId
    # Daemon of the driver rank.
    serve_address: str
    deployment: DeploymentId
    capacity: Capacity | None = None
    model_path: str
    # Served model name.
    model: str
    numerics: str
    # The deployment's: replays of one request before it fails.
    max_retries: int = 3
    # Its deployment asks for another model by now.
    outdated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """A worker daemon, with or without a replica: it may hold streams to be resumed."""

    node: NodeId
    serve_address: str
    # It is lost, or has left.
    gone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTable:
    """Full at the session's start, then changes; a row with phase CLOSED removes its replica."""

    full: bool
    rows: tuple[ReplicaRow, ...] = ()
    workers: tuple[WorkerRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    permit: Permit
    serve_address: str
    node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRefused:
    request: RequestId
    attempt: Attempt
    code: RouteCode
    reason: Reason
    retry_ms: int = 0
    # With STALE_ATTEMPT: the highest that the leader knows.
    newest_attempt: Attempt = NO_ATTEMPT


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedBatch:
    routed: tuple[Routed, ...] = ()
    refused: tuple[RouteRefused, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaClosed:
    """Always sent before any Routed to the replica's next epoch."""

    replica: ReplicaId
    epoch: Epoch
    reason: Reason
    suspects: tuple[RequestId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRequests:
    """Planned: the named requests must run elsewhere; all of the replica epoch's when none is named."""

    replica: ReplicaId
    epoch: Epoch
    requests: tuple[RequestId, ...] = ()
    deadline_ms: int
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequest:
    request: RequestId
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    request: RequestId
    # Empty: unknown.
    node: NodeId
    serve_address: str


RouteUp = GatewayHello | Inventory | RouteBatch | EndBatch | Locate | FirstTokens | GatewayHeartbeat | Fenced


RouteDown = (
    GatewayWelcome
    | SessionRefused
    | ReplicaTable
    | RoutedBatch
    | ReplicaClosed
    | MoveRequests
    | CancelRequest
    | Located
    | LeaderHeartbeat
)
