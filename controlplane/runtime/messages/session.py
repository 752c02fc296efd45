"""Frames of a worker daemon's session with the leader (Attach).

Mirrors protos/perdure/v1/session.proto field by field; wire.py checks that at import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from controlplane.runtime.ids import (
    Attempt,
    ClusterId,
    Epoch,
    GatewayId,
    Incarnation,
    NodeId,
    ReplicaId,
    RequestId,
    SessionId,
    Term,
)
from controlplane.runtime.messages.common import (
    Capacity,
    Device,
    Member,
    Permit,
    RankPhase,
    Reason,
    ReplicaPhase,
    ReplicaSpec,
    TimingSpec,
)
from controlplane.runtime.messages.weights import HeldWeights, PreloadWeights, WeightSource, WeightsState


class SequencePhase(IntEnum):
    RESERVED = 1
    WAITING = 2
    RUNNING = 3
    FINISHED = 4
    ORPHAN = 5
    LOST = 6


class GroupPhase(IntEnum):
    PREPARED = 1
    FORMED = 2
    LOADED = 3
    ABORTED = 4
    RELEASED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHello:
    cluster: ClusterId
    node: NodeId
    incarnation: Incarnation
    # host:port of the daemon's gRPC server.
    serve_address: str
    boot_id: str
    highest_term_seen: Term
    lease_id: int
    devices: tuple[Device, ...] = ()
    host: str
    pid: int
    versions: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """All the worker holds, in chunks, right after Welcome. Nothing carries over from an older session."""

    ranks: tuple[RankInfo, ...] = ()
    replicas: tuple[ReplicaInfo, ...] = ()
    sequences: tuple[SequenceInfo, ...] = ()
    last: bool = True
    draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    device: str
    pid: int
    phase: RankPhase
    replica: ReplicaId = ReplicaId("")
    epoch: Epoch = Epoch(0)
    rank: int = 0
    held: HeldWeights | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    replica: ReplicaId
    epoch: Epoch
    phase: ReplicaPhase
    capacity: Capacity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceInfo:
    gateway: GatewayId
    request: RequestId
    attempt: Attempt
    replica: ReplicaId
    epoch: Epoch
    phase: SequencePhase
    # Prompt and generated tokens held.
    tokens: int
    choices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """On change and at least every heartbeat interval."""

    uptime_ms: int
    # How late the daemon's own loop ran last, in milliseconds.
    loop_lag_ms: int = 0
    replicas: tuple[ReplicaLoad, ...] = ()
    health: tuple[DeviceHealth, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    replica: ReplicaId
    epoch: Epoch
    free_blocks: int
    running: int
    waiting: int
    # Recent step time, milliseconds.
    step_ms: float = 0.0
    # Moves per layer or collective while the replica works.
    progress: int = 0
    # Recent prefix block hashes (64 bits each, little-endian), at most 4 KiB. A hint only.
    prefix_digest: bytes = b""
    waiting_tokens: int = 0
    queue: tuple[QueueClass, ...] = ()
    # Time in which its ranks here could not have moved, in all.
    starved_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueClass:
    priority: int
    count: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceHealth:
    device: str
    ok: bool
    reason: Reason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    device: str
    pid: int
    replica: ReplicaId
    epoch: Epoch
    rank: int
    phase: RankPhase
    reason: Reason | None = None
    exit_code: int | None = None
    exit_signal: int | None = None
    # Requests whose sequences were in the unfinished step.
    suspects: tuple[RequestId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """A worker's answer for all its ranks of one replica epoch."""

    replica: ReplicaId
    epoch: Epoch
    phase: GroupPhase
    ok: bool
    reason: Reason | None = None
    # From the worker of rank 0 with PREPARED: host:port where the group meets.
    rendezvous: str = ""
    # With LOADED, from the worker of rank 0.
    capacity: Capacity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    replica: ReplicaId
    epoch: Epoch
    stage: str
    # 0 to 1 over the whole load.
    fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignLapsed:
    """Permits whose body never came."""

    permits: tuple[Permit, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """The daemon was asked to stop: it drains until the deadline, then goes."""

    deadline_ms: int
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Fenced:
    """A frame that was refused for its term or epoch."""

    frame: str
    seen_term: Term = Term(0)
    seen_epoch: Epoch = Epoch(0)
    highest_term: Term


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerWelcome:
    term: Term
    session: SessionId
    timing: TimingSpec
    # The process that leads. A term that two of them lead, after etcd was restored, is good for nobody.
    leader: Incarnation = Incarnation("")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRefused:
    """Also answers a gateway's Hello."""

    reason: Reason
    highest_term: Term
    # Empty: unknown.
    leader_address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignBatch:
    """Reserves and orders; authority and bytes arrive with the body on Serve."""

    permits: tuple[Permit, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareGroup:
    replica: ReplicaId
    epoch: Epoch
    members: tuple[Member, ...] = ()
    # Distinguishes this forming from any earlier one at the same rendezvous.
    nonce: str
    spec: ReplicaSpec
    deadline_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FormGroup:
    replica: ReplicaId
    epoch: Epoch
    rendezvous: str
    deadline_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReplica:
    replica: ReplicaId
    epoch: Epoch
    deadline_ms: int
    # Living ranks that hold weights of the same model, to copy from where that is faster than reading files.
    sources: tuple[WeightSource, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortGroup:
    """Ends the epoch: sequences are dropped, processes and weights stay."""

    replica: ReplicaId
    epoch: Epoch
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseReplica:
    """Ends the replica on this worker: its ranks exit and free their devices."""

    replica: ReplicaId
    epoch: Epoch
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainNode:
    deadline_ms: int
    reason: Reason
    # Exit once drained.
    exit: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UndrainNode:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Relet:
    """The node's lease is gone while its session lives: take a new one, close nothing."""

    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeCheckpoint:
    checkpoint: str
    path: str
    deadline_ms: int


AttachUp = (
    WorkerHello
    | WorkerSnapshot
    | Heartbeat
    | RankState
    | GroupState
    | LoadProgress
    | AssignLapsed
    | Drained
    | Leaving
    | Fenced
    | WeightsState
)


AttachDown = (
    WorkerWelcome
    | SessionRefused
    | AssignBatch
    | PrepareGroup
    | FormGroup
    | LoadReplica
    | AbortGroup
    | ReleaseReplica
    | DrainNode
    | UndrainNode
    | Relet
    | TakeCheckpoint
    | PreloadWeights
)
